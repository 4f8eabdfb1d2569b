"""Why an attention stays what it was: the reasons a user sees, each with a remedy."""

from __future__ import annotations

import enum


class StemWarning(UserWarning):
    """Something that a user of the backend should hear of: an attention that it failed on, a long prompt that stays
    dense."""


class KernelWarning(StemWarning):
    """A kernel failed while a model ran; the call was answered by dense attention under the same mask."""


class Reason(enum.Enum):
    """Why an attention stays what it was. The value says it to a reader; ``remedy`` says what would change it."""

    DROPOUT = "dropout is active"
    GRADIENT = "gradients are needed"
    BIDIRECTIONAL = "no causal mask"
    CROSS_ATTENTION = "cross attention"
    DECODE = "decode: few queries"
    SHORT = "prompt is shorter than min_length"
    SLOWER = "dense attention is faster here"
    MASK = "mask is not understood"
    FAINT = "hidden keys keep a finite score that does not surely hide them"
    SHAPE = "shapes are not those of one attention"
    DTYPE = "dtype is not fp16, bf16 or fp32"
    HEAD_DIM = "no kernel for this head dim"
    DEVICE = "no kernels for this device"
    CHUNK = "a chunk of the prompt cuts a block of queries in two"
    DENSE_LAYER = "dense_layers keeps it dense"
    FUEL = "fuel is used up"
    ESCAPES = "scores or probabilities are used elsewhere"
    WRITTEN = "what it reads is written in place before it is done"
    TRANSFORM = "inside torch.vmap, jvp or grad"
    REGION = "inside a higher-order operator"
    UNPROVEN = "what was read differs from what the graph computes"
    INTERNAL = "stem_compile failed on it"

    @property
    def remedy(self) -> str:
        """What a user can do about it."""
        return _REMEDIES[self]


_REMEDIES = {
    Reason.DROPOUT: "call model.eval()",
    Reason.GRADIENT: "run under torch.no_grad() or torch.inference_mode()",
    Reason.BIDIRECTIONAL: "nothing to do: budgets that fall with position mean nothing without a causal order",
    Reason.CROSS_ATTENTION: "nothing to do: only self-attention is rewritten",
    Reason.DECODE: "nothing to do: only prefill is rewritten",
    Reason.SHORT: "lower min_length to rewrite short prompts too",
    Reason.SLOWER: "set min_length to rewrite from that length on, whatever was measured",
    Reason.MASK: "build the mask in the graph from positions, or pass a padding mask of shape [batch, keys]",
    Reason.FAINT: "hide keys with -inf or torch.finfo(dtype).min",
    Reason.SHAPE: (
        "pass q, k, v as [batch, heads, length, head dim] with equal batch and a whole number of query heads a key head"
    ),
    Reason.DTYPE: "cast the model to fp16, bf16 or fp32",
    Reason.HEAD_DIM: "nothing to do short of another model: head dims up to 256 have kernels everywhere",
    Reason.DEVICE: "move the model to a CPU or a CUDA device",
    Reason.CHUNK: "prefill in chunks of a multiple of block_size tokens, or leave prompt_length out",
    Reason.DENSE_LAYER: "take it out of dense_layers",
    Reason.FUEL: "raise fuel",
    Reason.ESCAPES: "do not ask for attention weights (output_attentions=False)",
    Reason.WRITTEN: "make the change out of place: x = x + y, torch.where, torch.cat",
    Reason.TRANSFORM: "compile the function that is transformed, or call it on a batch",
    Reason.REGION: "call the attention outside of torch.cond, while_loop, scan and map",
    Reason.UNPROVEN: "report it with the mask's source; the attention stays dense and right",
    Reason.INTERNAL: "report it with the log of TORCH_LOGS=+stem_compile",
}
