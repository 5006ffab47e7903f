"""Does the mixture compute what the dense model computes? Both run side by side, one unit in memory at a
time.

Legend: T tokens, D hidden, L layers, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.checkpoint import Checkpoint, dequantized, fuse
from moeforge.checkpoint.names import EMBED, HEAD
from moeforge.config.model import ModelConfig
from moeforge.errors import RunError, UserError
from moeforge.model import DenseAttention, ForwardContext, Transformer
from moeforge.model.rotary import rotary_angles

_FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight")
_EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}
PARAGRAPH = """\
The harbour town of Aldermere wakes before the sun does. By five o'clock the first boats have passed the
breakwater, and the women who mend the nets have put the kettle on. In 1873 the council counted 4,216 souls,
three churches and eleven taverns; a century later the taverns were fewer and the churches had become a
library, a school of music and a climbing hall. "What does it cost to keep a lighthouse?" the mayor once
asked. The keeper wrote two columns in his ledger: oil, wicks, paint and glass on the left, and on the right
a single line that read: ships not lost. To compute the mean of n numbers, add them and divide by n; to
compute what a light is worth, ask those who came home. def mean(values): return sum(values) / len(values)
"""


@dataclass(frozen=True)
class Verification:
    """How far the mixture is from the dense model on `tokens` tokens of one text.

    `layer_max_diff[i]` compares the hidden states after layer i. `bound` is what rounding may make of
    `max_logit_diff` where `preserves_function` says that nothing else differs; otherwise it binds nothing.
    """

    tokens: int
    max_logit_diff: float
    max_logit: float
    argmax_agreement: float
    layer_max_diff: tuple[float, ...]
    bound: float
    preserves_function: bool

    @property
    def passed(self) -> bool:
        """False only where a function-preserving method differs by more than rounding."""
        return self.max_logit_diff <= self.bound or not self.preserves_function

    def require(self) -> None:
        """RunError unless `passed`. (A NaN anywhere does not pass.)"""
        if not self.passed:
            worst = next((i for i, diff in enumerate(self.layer_max_diff) if not diff <= self.bound), None)
            where = "the head" if worst is None else f"layer {worst}"
            raise RunError(
                f"verification failed: logits differ by {self.max_logit_diff:.3g} from the dense ones, but "
                f"rounding allows {self.bound:.3g}; the first to differ is {where}. The output is kept"
            )


def sample_tokens(source: Checkpoint, text: str | None = None, limit: int = 256) -> Tensor:
    """The first `limit` token ids [T] of a text (default: a built-in paragraph) in the source's tokens.

    A source without a tokenizer gets seeded random ids, unless a text is given: then UserError.
    """
    config = source.config
    limit = min(limit, config.max_positions)
    if not source.has_tokenizer:
        if text is not None:
            raise UserError(f"--text: {source.path} has no tokenizer to read the text with")
        rng = torch.Generator().manual_seed(0)
        return torch.randint(config.vocab_size, (limit,), generator=rng)
    ids = source.tokenizer()(PARAGRAPH if text is None else text, verbose=False)["input_ids"][:limit]
    if not ids:
        raise UserError("--text: the text has no tokens; give at least one word")
    return torch.tensor(ids)


@torch.no_grad()
def verify(
    dense: Checkpoint,
    mixture: Checkpoint,
    tokens_T: Tensor,
    preserves_function: bool,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Compares hidden states after every layer, and the logits, in `dtype` arithmetic.

    Each dense weight is first rounded to the type in which the mixture stores what was made of it, so that the
    method is judged and not `--dtype`. `progress` is called with the number of layers done, the head counting as the
    last.
    """
    dense = dequantized(dense)

    def dense_weight(name: str) -> Tensor:
        return dense.tensor(name).to(mixture.dtype(_made_of(name, mixture.config))).to(dtype)

    def mixture_weight(name: str) -> Tensor:
        return mixture.tensor(name).to(dtype)

    differences: list[float] = []
    walks = (
        _hidden_states(source.config, weight, tokens_T, dtype)
        for source, weight in ((dense, dense_weight), (mixture, mixture_weight))
    )
    for hidden_TD, other_TD in zip(*walks, strict=True):
        differences.append(_largest(hidden_TD - other_TD))
        if progress is not None:
            progress(len(differences))
    head = EMBED if dense.config.tie_embeddings else HEAD
    logits_TV = F.linear(hidden_TD, dense_weight(head))
    other_TV = F.linear(other_TD, mixture_weight(head))
    largest = _largest(logits_TV)
    return Verification(
        tokens=len(tokens_T),
        max_logit_diff=_largest(logits_TV - other_TV),
        max_logit=largest,
        argmax_agreement=(logits_TV.argmax(-1) == other_TV.argmax(-1)).double().mean().item(),
        layer_max_diff=tuple(differences[:-1]),
        bound=_rounding(dense.config, mixture, dtype) * largest,
        preserves_function=preserves_function,
    )


def _hidden_states(
    config: ModelConfig, weight: Callable[[str], Tensor], tokens_T: Tensor, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Hidden states [T, D] after each of the L layers, then after the final norm. `weight` reads a canonical name.

    The model is built without storage; each unit gets its weights when its turn comes and loses them after
    it.
    """
    with torch.device("meta"):
        model = Transformer(config).eval()
    positions_T = torch.arange(len(tokens_T))
    rotary = rotary_angles(config, positions_T, dtype)
    context = ForwardContext(DenseAttention(1, len(tokens_T)))
    x = tokens_T
    for (name, unit), (_, group) in zip(model.units(), groupby(fuse(config, weight), _unit_of), strict=True):
        unit.load_state_dict({key.removeprefix(f"{name}."): tensor for key, tensor in group}, assign=True)
        x = unit(x, rotary, context)
        unit.to("meta")
        if name.endswith(".ffn") or name == "head":
            yield x


def _unit_of(weight: tuple[str, Tensor]) -> str:
    """The unit that a weight belongs to: layers.3.ffn for layers.3.ffn.experts.w2."""
    name = weight[0].split(".")
    return ".".join(name[:3]) if name[0] == "layers" else name[0]


def _made_of(name: str, mixture: ModelConfig) -> str:
    """The mixture's weight that a dense one became: itself, or the matrix of a layer's first expert."""
    match = _FFN.fullmatch(name)
    if match is None or not mixture.is_moe_layer(int(match[1])):
        return name
    return f"model.layers.{match[1]}.block_sparse_moe.experts.0.{_EXPERT[match[2]]}.weight"


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rounding(dense: ModelConfig, mixture: Checkpoint, dtype: torch.dtype) -> float:
    """Relative bound on what rounding does to the logits over L layers.

    Scaling by a power of two rounds nothing; any other granularity rounds w2 once more to its stored type.
    """
    assert mixture.config.moe is not None
    shards = dense.ffn_size // mixture.config.moe.expert_size
    types = [dtype]
    if shards & (shards - 1):
        names = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in mixture.config.moe_layers)
        types += [mixture.dtype(_made_of(name, mixture.config)) for name in names]
    eps = max(torch.finfo(each).eps for each in types)
    return 16 * eps * math.sqrt(dense.num_layers)
