"""A peer for the clock: transformers' LlamaForCausalLM of a model's shape, with random weights, if it is installed.

Same width, depth, heads, vocabulary and number of weights in the matrices: Llama's MLP has three where ours has two, so
its hidden width is 8/3 of the model's instead of 4 times. Only speeds are compared.
"""

import importlib.util
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from nanochat.config import ModelConfig

PACKAGE = "transformers"


def has_peer() -> bool:
    """Whether the package is there; nothing is imported."""
    return importlib.util.find_spec(PACKAGE) is not None


class Peer:
    """`generate` of transformers with the clock in its hand."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package: Any = importlib.import_module(PACKAGE)
        self.version: str = package.__version__
        package.logging.set_verbosity_error()
        torch.manual_seed(seed)
        shape = package.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=config.n_embd * 8 // 3,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            max_position_embeddings=config.sequence_len,
            tie_word_embeddings=False,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=None,
        )
        self.model = package.LlamaForCausalLM(shape).to(device, dtype).eval()
        self._criteria = package.StoppingCriteriaList

    def stamps(self, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float, top_k: int) -> list[float]:
        """Seconds from the call to each new token of all prompts, which must be of one length."""
        stamps: list[float] = []

        def note(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            stamps.append(time.perf_counter() - began)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        ids = torch.tensor(prompts, device=self.model.device)
        began = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=True,
                temperature=temperature,
                top_k=top_k,
                stopping_criteria=self._criteria([note]),
            )
        assert len(stamps) == new_tokens
        return stamps

    def tokens_per_s(self, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float, top_k: int) -> float:
        """Behind the first token of each."""
        stamps = self.stamps(prompts, new_tokens, temperature, top_k)
        return len(prompts) * (new_tokens - 1) / (stamps[-1] - stamps[0])
