"""Attention maps: how much each token of one transformer block looks at each other token.

The block is not computed a second time: hooks read what it computes anyway, and are gone after the
pass. Of open_clip 3.3's 144 configs, the image towers of 116 have such blocks: open_clip's own ViT
(OpenAI, LAION, DFN, CLIPA, CoCa), and from timm ViT, SigLIP and SigLIP 2, EVA-01 and EVA-02,
Perception Encoder, MobileCLIP-B and -L, ViTamin (its last stage) and relative-position ViT. timm's
BEiT and parallel-block ViT work too. ModifiedResNet, ConvNeXt, FastViT and Swin (windows) have no
attention from every token to every token, and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

Query = Literal["class", "mean"]
Record = Callable[[Tensor], None]


@contextmanager
def attention_of(visual: nn.Module, block: int = -1) -> Iterator[list[Tensor]]:
    """Collect the attention of one block, whoever calls the tower and however often.

    Use it around `AlphaClip.encode_image` or `encode_regions`; for a single pass of a tower there
    is `encode_with_attention`.

    Args:
        visual: An open_clip image tower, with or without an alpha channel.
        block: Which block; negative counts from the end.

    Yields:
        A list to which each pass adds `[batch, heads, tokens, tokens]`: after the softmax, a row
        for each query, in the type the block computes in, still part of the graph if gradients
        are on. The list is the caller's; the tower keeps nothing.

    Raises:
        ValueError: If the tower has no blocks of tokens, no such block, or one whose attention
            can't be read; the message names the class.
    """
    attend, (home, _) = find_attention(visual, block), find_blocks(visual)
    maps: list[Tensor] = []
    with ExitStack() as stack:
        # Checkpointing would run the block again during backward, when the hooks are gone, and
        # find that it saves other tensors.
        stack.enter_context(setting(home, "grad_checkpointing", False))
        _watcher(attend)(attend, maps.append, stack)
        yield maps


def encode_with_attention(
    visual: nn.Module, rgba: Float[Tensor, "batch channels height width"], block: int = -1
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch heads tokens tokens"]]:
    """Run a tower once; return its features and the attention of one block.

    Args:
        visual: An open_clip image tower, with or without an alpha channel.
        rgba: What the tower takes: normalised RGB, and alpha after an alpha surgery.
        block: Which block; negative counts from the end.

    Returns:
        Features, not normalised, and attention, as `attention_of` describes it.

    Raises:
        ValueError: As `attention_of` does.
        RuntimeError: If the tower ran without running the block's hooks, as compiled towers do.
    """
    with attention_of(visual, block) as maps:
        features = visual(rgba)
    if len(maps) != 1:
        raise RuntimeError(
            f"expected one pass of block {block} of {type(visual).__name__}, saw {len(maps)}; "
            "a compiled tower skips hooks: pass the tower it was compiled from"
        )
    # CoCa's towers return their tokens as well.
    return features[0] if isinstance(features, tuple) else features, maps[0]


def grid_attention(
    visual: nn.Module,
    attention: Float[Tensor, "batch heads tokens tokens"],
    query: Query | None = None,
) -> Float[Tensor, "batch heads rows columns"]:
    """Lay the attention that patches receive out on the tower's patch grid.

    What class and register tokens receive is left out, so a map sums to at most 1.

    Args:
        visual: The tower that the attention comes from.
        attention: As given by `encode_with_attention`.
        query: Who looks: the `class` token, or the `mean` over the patches. By default the class
            token where the tower's features come from it, else the mean (SigLIP, Perception
            Encoder, ViTamin, CLIPA, CoCa pool in other ways).

    Raises:
        ValueError: If `query` is unknown or asks for a class token that the tower lacks, or the
            tokens are not those of the tower's grid.
    """
    layout = TokenLayout.of(visual)
    prefix, (rows, columns) = layout.prefix, layout.grid
    tokens = prefix + rows * columns
    if attention.ndim != 4 or attention.shape[2:] != (tokens, tokens):
        raise ValueError(
            f"expected attention [batch, heads, {tokens}, {tokens}] ({prefix} + {rows} x {columns} "
            f"tokens of {layout.tower}), got {list(attention.shape)}; patch dropout while training "
            "and images of another size change the tokens"
        )
    if query not in (None, "class", "mean"):
        raise ValueError(f"query must be 'class' or 'mean', got {query!r}")
    if query == "class" and not layout.has_class:
        raise ValueError(f"{layout.tower} has no class token; use query='mean'")
    received = attention[..., prefix:]
    of_class = query == "class" or (query is None and layout.pools_class)
    received = received[:, :, 0] if of_class else received[:, :, prefix:].mean(2)
    laid_out: Tensor = received.unflatten(-1, layout.grid)
    return laid_out


@dataclass(frozen=True)
class TokenLayout:
    """What the tokens of a tower are: class and register tokens, then a patch grid.

    Attributes:
        tower: The class of the tower, for messages.
        prefix: How many tokens come before the patches.
        grid: Rows and columns of the patches.
        has_class: Whether the first token is a class token.
        pools_class: Whether the tower's features come from that one alone.
    """

    tower: str
    prefix: int
    grid: tuple[int, int]
    has_class: bool
    pools_class: bool

    @classmethod
    def of(cls, visual: Any) -> TokenLayout:
        """Return the layout of a tower.

        Raises:
            ValueError: If the tower has no blocks of tokens; the message names its class.
        """
        find_blocks(visual)
        if not hasattr(visual, "trunk"):
            # open_clip prepends a class token even where it is not pooled.
            pools_class = visual.pool_type == "tok" and visual.attn_pool is None
            return cls(type(visual).__name__, 1, tuple(visual.grid_size), True, pools_class)
        trunk = visual.trunk
        # Not `grid_size`: timm's is for its own image size, open_clip's config may have another
        # (ViTamin-XL-384 takes 256 px).
        rows, columns = trunk.patch_embed.dynamic_feat_size(visual.image_size)
        has_class = getattr(trunk, "cls_token", None) is not None
        return cls(
            type(trunk).__name__,
            trunk.num_prefix_tokens,
            (rows, columns),
            has_class,
            pools_class=has_class and trunk.global_pool == "token",
        )


def find_blocks(visual: nn.Module) -> tuple[nn.Module, nn.ModuleList | nn.Sequential]:
    """Return what holds a tower's blocks (and says whether they are checkpointed), and the blocks.

    Raises:
        ValueError: If the tower has no blocks of tokens; the message names its class.
    """
    trunk = getattr(visual, "trunk", None)
    home: Any = trunk or getattr(visual, "transformer", None)
    blocks = getattr(home, "blocks" if trunk else "resblocks", None)
    # A text tower has blocks as well, EfficientNet has blocks of another kind: but no patches.
    has_patches = hasattr(trunk or visual, "patch_embed" if trunk else "grid_size")
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not has_patches:
        raise ValueError(
            "expected a tower of tokens (a ViT): patches, then blocks, in open_clip's "
            "visual.transformer.resblocks or timm's visual.trunk.blocks; got "
            f"{type(trunk or visual).__name__}"
        )
    return home, blocks


def find_attention(visual: nn.Module, block: int) -> nn.Module:
    """Return the attention of one block of a tower; negative numbers count from the end.

    Raises:
        ValueError: If the tower has no blocks of tokens, or not this one.
    """
    _, blocks = find_blocks(visual)
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(
            f"{type(getattr(visual, 'trunk', visual)).__name__} has {len(blocks)} blocks: "
            f"expected a block in {-len(blocks)}..{len(blocks) - 1}, got {block}"
        )
    # timm's parallel blocks are attention and MLP in one module.
    attend: nn.Module = getattr(blocks[block], "attn", blocks[block])
    return attend


def _watcher(attend: nn.Module) -> Callable[[Any, Record, ExitStack], None]:
    """Return what reads the attention of a kind of module.

    Raises:
        ValueError: If nothing does.
    """
    from open_clip.transformer import Attention

    if isinstance(attend, nn.MultiheadAttention):
        return _watch_torch
    if isinstance(attend, Attention) and attend.logit_scale is None:
        return _watch_open_clip
    if hasattr(attend, "fused_attn") and isinstance(getattr(attend, "attn_drop", None), nn.Module):
        return _watch_timm
    kind = " with scaled cosine" if isinstance(attend, Attention) else ""
    raise ValueError(
        f"can't read the attention of {type(attend).__name__}{kind}; expected "
        "nn.MultiheadAttention, open_clip's Attention without scaled cosine, or a module of timm "
        "with `fused_attn` and `attn_drop`"
    )


def _watch_torch(attend: nn.MultiheadAttention, record: Record, stack: ExitStack) -> None:
    """Ask for the weights that open_clip's blocks do without; the native fast path honours it."""

    def ask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def take(_: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        record(output[1])

    stack.enter_context(attend.register_forward_pre_hook(ask, with_kwargs=True))
    stack.enter_context(attend.register_forward_hook(take))


def _watch_open_clip(attend: Any, record: Record, stack: ExitStack) -> None:
    """Score the block's own queries and keys.

    With `use_fsdpa` off it would do so itself, but open_clip 3.3 then fails in `bmm`.
    """
    queries: list[Tensor] = []

    def keep(_: nn.Module, args: Any, q: Tensor) -> None:
        queries[:] = [q]

    def score(_: nn.Module, args: Any, k: Tensor) -> None:
        scores: Tensor = (queries.pop() * attend.scale) @ k.transpose(-2, -1)
        record(scores.softmax(-1))

    stack.enter_context(attend.ln_q.register_forward_hook(keep))
    stack.enter_context(attend.ln_k.register_forward_hook(score))


def _watch_timm(attend: Any, record: Record, stack: ExitStack) -> None:
    """Have timm write its attention out, and take what enters the dropout."""
    entering: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        entering[:] = args[:1]  # not append: a pass may have failed half-way

    def take(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        # Windows, attention between channels and differential attention go by the same names.
        tokens, shapes = args[0], [list(a.shape) for a in entering]
        batch, count = tokens.shape[:2]
        if tokens.ndim != 3 or shapes != [[batch, attend.num_heads, count, count]]:
            raise ValueError(
                f"can't read the attention of {type(attend).__name__}: for an input of shape "
                f"{list(tokens.shape)} and {attend.num_heads} heads, expected scores of shape "
                f"[batch, heads, tokens, tokens], got {shapes}"
            )
        record(entering.pop())

    stack.enter_context(setting(attend, "fused_attn", False))
    stack.enter_context(attend.attn_drop.register_forward_pre_hook(keep))
    stack.enter_context(attend.register_forward_hook(take))


@contextmanager
def setting(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute that exists, and put it back."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
