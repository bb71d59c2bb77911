"""What removing parts of a ViT does to its predictions, for many parts of one block at a time, fast and exactly.

A Probe walks over the blocks from the last to the first. What lies before its block is clean, so it is cached; what
lies after runs as it was left, physically without what was removed there. Within the block a head or a group of
neurons is a term of a sum: it is subtracted, and no attention runs again. Where the head of the model reads the class
token alone, the last block computes that row alone.
"""

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from lib import blocks
from lib.pruners import surgery
from lib.pruners.components import Component

# In the order in which a block's parts are tried: late before early, larger before smaller.
STAGES = ("block", "mlp", "neuron", "attn", "head")
WHOLE = {"neuron": "mlp", "head": "attn"}  # what a part goes with


def log_p(logits: Tensor) -> Tensor:
    """log softmax (B, C) in float64, in which KL is not lost to rounding."""
    return logits.double().log_softmax(dim=1)


def divergence(clean: Tensor, logits: Tensor) -> Tensor:
    """KL(clean ‖ softmax(logits)) in nats per image (B,); clean: log-probabilities (B, C)."""
    return (clean.exp() * (clean - log_p(logits))).sum(dim=1).clamp(min=0)  # rounding gives -1e-17 for what is equal


def some_images(batches: Iterable[Tensor]) -> list[Tensor]:
    """The batches as a list; ValueError where there is no image in them."""
    batches = list(batches)
    if not sum(map(len, batches)):
        raise ValueError("batches are empty: expected at least one image tensor (B, 3, H, W)")
    return batches


class Probe:
    """KL(clean ‖ pruned) of candidates for removal, in nats.

    vit: a timm VisionTransformer; a copy of it is worked on. batches: image tensors (B, 3, H, W) on its device.
    cache_mb: memory for what is cached; what does not fit is computed again. kl: the mean over images of all that is
    removed so far. ahead: how many parts are worth trying together here.
    """

    def __init__(self, vit: nn.Module, batches: Iterable[Tensor], cache_mb: float = 2048):
        self.vit = copy.deepcopy(vit).eval().requires_grad_(False)
        batches = some_images(batches)
        with torch.inference_mode():
            self.images, self.clean = torch.cat(batches), torch.cat([log_p(self.vit(x)) for x in batches])
        # Images and parts that run together: on a CPU few, which stay in its caches and let a sum of KL end early.
        numbers = (vit.patch_embed.num_patches + vit.num_prefix_tokens) * vit.embed_dim  # of an image, between blocks
        self.chunk, self.ahead = (min(64, max(8, 2**18 // numbers)), 1) if self.images.device.type == "cpu" else (32, 8)
        self.chunks = len(self.images.split(self.chunk))
        self.kl = 0.0
        # What an image is likely to lose: at first its entropy.
        self.worry = -(self.clean.exp() * self.clean).sum(dim=1)
        self.after: list[nn.Module] = []
        self.budget = cache_mb * 2**20
        self.fed: dict[int, dict[int, Tensor]] = {}  # block → chunk → what the block is fed
        self.held: dict[tuple[str, int], Tensor] = {}  # (what, chunk) → what the current block makes of it

    def enter(self, index: int) -> None:
        """Go to block `index`: the last one, or the one before that just left."""
        self.index, self.block = index, self.vit.blocks[index]
        self.gone: dict[str, list[Component]] = {stage: [] for stage in STAGES}
        self._sort()

    def _sort(self) -> None:
        """Images that lose much go first: their sum soonest shows that a part must stay."""
        order = self.worry.argsort(descending=True, stable=True)
        self.images, self.clean, self.worry = (t[order] for t in (self.images, self.clean, self.worry))
        for index, parts in self.fed.items():
            whole = [parts[chunk] for chunk in range(self.chunks)] if len(parts) == self.chunks else []
            self.fed[index] = dict(enumerate(torch.cat(whole)[order].split(self.chunk))) if whole else {}

    def begin(self, stage: str) -> bool:
        """Go to a stage of the block; whether its parts are still there and not gone with a larger one."""
        if stage == "attn":  # the MLP is decided: what follows runs it without what was removed
            heads = [*range(self.block.attn.num_heads)]
            surgery.slice_block(self.block, heads, self._kept("neuron"), mlp=not self.gone["mlp"])
        self.held = {key: value for key, value in self.held.items() if key[0] in ("joined", "middle")}
        return not self.gone["block"] and not self.gone.get(WHOLE.get(stage))

    def leave(self) -> None:
        """Done with this block: from now on it runs without what was removed."""
        if not self.gone["block"]:
            neurons = [*range(surgery.sizes(self.block)[1])]
            mlp = not self.gone["mlp"]
            surgery.slice_block(self.block, self._kept("head"), neurons, not self.gone["attn"], mlp)
            self.after.insert(0, self.block)
        self.fed.pop(self.index, None)
        self.held = {}

    def remove(self, stage: str, part: Component, kl: float) -> None:
        """Take the part out for good; kl: the mean of what `effects` gave for it."""
        self.gone[stage].append(part)
        self.kl = kl
        for what, chunk in [*self.held]:
            if what == stage:
                self.held[what, chunk] = self.held[what, chunk] - self._term(stage, chunk, part)

    @torch.inference_mode()
    def effects(
        self, stage: str, sets: Sequence[Sequence[Component]], limits: Sequence[float] | None = None
    ) -> list[Tensor]:
        """Per set of parts of this stage the KL (images,) without them and all removed before, in the probe's order.

        limits: a mean KL per set; one that reaches its limit on some images is not run on the others, which stay at 0:
        no image's KL is below that, so the mean is a lower bound. Of sets that contain each other those that follow are
        then left as well.
        """
        nested = any(len(chosen) > 1 for chosen in sets)
        found = self.clean.new_zeros(len(sets), len(self.images))
        alive = [*range(len(sets))]
        for chunk in range(self.chunks):
            logits = self._finish(self._without(stage, chunk, [sets[i] for i in alive]))
            rows = self._chunk(chunk)
            kl = divergence(self.clean[rows].repeat(len(alive), 1), logits).view(len(alive), -1)
            found[alive, rows] = kl
            self.worry[rows] = 0.8 * self.worry[rows] + 0.2 * kl[0]
            if limits is not None:
                sums = found.sum(dim=1).tolist()
                alive = [i for i in alive if sums[i] < limits[i] * len(self.images)]
            if nested:
                alive = [i for place, i in enumerate(alive) if i == place]
            if not alive:
                break
        return [*found]

    def _chunk(self, chunk: int) -> slice:
        return slice(chunk * self.chunk, (chunk + 1) * self.chunk)

    # ---- the block ----------------------------------------------------------------------------------------------

    def _without(self, stage: str, chunk: int, sets: Sequence[Sequence[Component]]) -> Tensor:
        """What the block gives without each of the sets, one after another along the batch."""
        if stage in ("block", "attn"):  # both leave the residual stream; the MLP follows after the attention
            x = self._rows(self._fed(chunk))
            return x if stage == "block" else blocks.add_mlp(self.block, x)
        if stage == "mlp":
            return self._middle(chunk)
        sums, done = self._hold(stage, chunk, lambda: self._sum(stage, chunk)), {}
        for chosen in map(tuple, sets):
            done[chosen] = done.get(chosen[:-1], sums) - self._term(stage, chunk, chosen[-1])
        outputs = torch.cat([*done.values()])
        return blocks.add_mlp(self.block, outputs) if stage == "head" else outputs

    def _sum(self, stage: str, chunk: int) -> Tensor:
        """The residual stream after the attention (head) or the MLP (neuron), without the parts already removed."""
        total = self._middle(chunk)
        if stage == "neuron":
            total = total + self.block.ls2(self.block.mlp.fc2(self._hidden(chunk)))
        for part in self.gone[stage]:
            total = total - self._term(stage, chunk, part)
        return total

    def _term(self, stage: str, chunk: int, part: Component) -> Tensor:
        """What a head or a group of neurons adds to the residual stream."""
        if stage == "head":
            d = self.block.attn.head_dim
            cut = slice(part.units[0] * d, (part.units[-1] + 1) * d)
            return self.block.ls1(self._joined(chunk)[..., cut] @ self.block.attn.proj.weight[:, cut].T)
        cut = slice(part.units[0], part.units[-1] + 1)
        return self.block.ls2(self._hidden(chunk)[..., cut] @ self.block.mlp.fc2.weight[:, cut].T)

    def _hidden(self, chunk: int) -> Tensor:
        """What fc2 is fed, (B, rows, M)."""
        mlp, norm = self.block.mlp, self.block.norm2
        return self._hold("hidden", chunk, lambda: mlp.norm(mlp.act(mlp.fc1(norm(self._middle(chunk))))))

    def _middle(self, chunk: int) -> Tensor:
        """The residual stream after the whole attention, (B, rows, D)."""

        def make() -> Tensor:
            x, attn = self._rows(self._fed(chunk)), self.block.attn
            return blocks.add_attention(self.block, x, attn.proj(self._joined(chunk)) if attn.num_heads else attn(x))

        return self._hold("middle", chunk, make)

    def _joined(self, chunk: int) -> Tensor:
        """What the attention's projection is fed, (B, rows, H · d)."""

        def make() -> Tensor:
            attn, fed = self.block.attn, self.block.norm1(self._fed(chunk))
            q, k, v = blocks.qkv(attn, fed)
            return blocks.join(attn, blocks.attend(attn, self._rows(q, dim=2), k, v), self._rows(fed))

        return self._hold("joined", chunk, make)

    def _kept(self, kind: str) -> list[int]:
        gone = {unit for part in self.gone[kind] for unit in part.units}
        return [unit for unit in range(surgery.sizes(self.block)[kind == "neuron"]) if unit not in gone]

    # ---- before and after it ------------------------------------------------------------------------------------

    @property
    def _reads_one(self) -> bool:
        return self.vit.global_pool == "token" and blocks.classifying(self.vit) == 1

    def _rows(self, x: Tensor, dim: int = 1) -> Tensor:
        """The tokens of x that anything reads: one where no block follows and the head reads the class token."""
        return x.narrow(dim, 0, 1) if self._reads_one and not self.after else x

    def _finish(self, x: Tensor) -> Tensor:
        """Logits of what this block gave."""
        for block in self.after[:-1]:
            x = block(x)
        if self.after:
            x = blocks.first_token(self.after[-1], x) if self._reads_one else self.after[-1](x)
        return self.vit.forward_head(self.vit.norm(x))

    def _fed(self, chunk: int) -> Tensor:
        """What the block is fed: cached, with as many earlier blocks' as there is memory for, or run from the image."""
        if (x := self.fed.get(self.index, {}).get(chunk)) is not None:
            return x
        vit = self.vit
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(self.images[self._chunk(chunk)])))
        # A block's own tensors (two of width 4 D, the others of D) are used more often than earlier blocks' inputs.
        room = self.budget / (x.nbytes * self.chunks) - 8
        for index in range(self.index + 1):
            if index > self.index - max(1, room):
                self._store(self.fed.setdefault(index, {}), chunk, x)
            if index < self.index:
                x = vit.blocks[index](x)
        return x

    def _hold(self, what: str, chunk: int, make: Callable[[], Tensor]) -> Tensor:
        if (value := self.held.get((what, chunk))) is None:
            value = make()
            self._store(self.held, (what, chunk), value)
        return value

    def _store(self, where: dict, key: int | tuple, value: Tensor) -> None:
        kept = (*self.held.values(), *(x for parts in self.fed.values() for x in parts.values()))
        if sum(t.nbytes for t in kept) + value.nbytes <= self.budget:
            where[key] = value
