"""Safe, declarative caching and resources for LangGraph nodes."""

__version__ = "0.1.0"
