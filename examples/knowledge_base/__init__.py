"""A knowledge base that answers questions from documents, cached node by node."""
