"""A reward behind HTTP, for rewards that are services or need another machine or language.

The request is a POST of the JSON `{"prompts": [N strings], "images": [N PNG files in base64]}`. The
response has status 200 and the JSON `{"scores": [N finite numbers]}` in the same order.
docs/howto/rewards.md has a complete server.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence

import numpy as np
import requests
import torch
from PIL import Image
from requests.adapters import HTTPAdapter
from urllib3 import Retry
from urllib3.exceptions import ReadTimeoutError

from b2ray.config import Reward, Section
from b2ray.errors import ConfigError
from b2ray.rewards.options import HttpOptions

# Seconds between two attempts: none before the second, then twice the first pause, doubled before
# each further attempt. The longest pause limits this and the server's Retry-After.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30
SHOWN = 200  # characters of a response that an error message contains


class Http:
    """Scores from the server at `options.url`, with repeated attempts for failed requests.

    Args:
        spec: the reward's specification.
        options: an `HttpOptions`.
        device: not used.

    Raises:
        ConfigError: `options.token_env` names an environment variable that is not set.
    """

    def __init__(self, spec: Reward, options: Section, device: torch.device) -> None:
        assert isinstance(options, HttpOptions)
        self.name, self.options = spec.name, options
        retry = Retry(
            total=options.retries,
            allowed_methods={"POST"},
            status_forcelist=(429, *range(500, 600)),
            backoff_factor=FIRST_PAUSE,
            backoff_max=LONGEST_PAUSE,
            retry_after_max=LONGEST_PAUSE,
            raise_on_status=False,
        )
        self.token = self._token()
        self.session = requests.Session()
        if self.token:
            self.session.auth = self._sign
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry))

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Scores of any range; arguments as in `b2ray.rewards.RewardModel`.

        Raises:
            ValueError: the server cannot be reached, is too slow, or answers wrongly; the message
                says which, and how to correct it.
        """
        body = {"prompts": list(prompts), "images": [_png(image) for image in images]}
        scores = self._scores(self._post(body))
        if len(scores) != len(prompts):
            raise self._wrong(f"{len(scores)} scores for {len(prompts)} pictures")
        return np.array(scores, np.float32)

    def _token(self) -> str:
        name = self.options.token_env
        if name and not os.environ.get(name):
            raise ConfigError(
                f"reward {self.name!r}: options.token_env is {name!r}, which is not set where the "
                "scorer runs: set it in the environment of every node"
            )
        return os.environ[name] if name else ""

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # A header of the session would be replaced by credentials from ~/.netrc; `auth` is not.
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request

    def _post(self, body: dict[str, list[str]]) -> requests.Response:
        tries = f"{self.options.retries + 1} tries"
        try:
            response = self.session.post(
                self.options.url, json=body, timeout=self.options.timeout, allow_redirects=False
            )
        except requests.RequestException as error:
            cause = error.args[0] if error.args else error
            cause = getattr(cause, "reason", cause)  # of urllib3's MaxRetryError
            if isinstance(cause, ReadTimeoutError):
                raise self._error(
                    f"did not answer within {self.options.timeout:g} s ({tries}): raise "
                    "options.timeout, lower the reward's batch, or give the server more power"
                ) from error
            reason = " ".join(str(cause).split())[:SHOWN]
            raise self._error(
                f"cannot be reached ({tries}): start the server or correct options.url: {reason}"
            ) from error
        if response.is_redirect:
            raise self._error(
                f"redirects to {response.headers['location']}, which is not followed: set "
                "options.url to where the scorer is"
            )
        if response.status_code != 200:
            raise self._wrong(f"status {response.status_code}: {response.text!r:.{SHOWN}}")
        return response

    def _scores(self, response: requests.Response) -> list[float]:
        try:
            answer = response.json()
        except requests.JSONDecodeError:
            raise self._wrong(f"no JSON but {response.text!r:.{SHOWN}}") from None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise self._wrong(f"no list under `scores` in {answer!r:.{SHOWN}}")
        for score in scores:
            if type(score) not in (int, float) or not math.isfinite(score):
                raise self._wrong(f"the score {score!r:.{SHOWN}}, which is not a finite number")
        return scores

    def _wrong(self, answer: str) -> ValueError:
        return self._error(f"answered with {answer}: correct the server, see docs/howto/rewards.md")

    def _error(self, problem: str) -> ValueError:
        if self.token:
            problem = problem.replace(self.token, "***")  # a response may repeat the request
        return ValueError(f"reward {self.name!r}: {self.options.url} {problem}")


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
