"""The network and the objective of JLT (arXiv 2605.27102). The legend, used in every file here:

    x   the clean latent of an image, shape (B, C, H, W)
    e   noise of the same shape, e ~ N(0, I)                    (the paper's epsilon)
    t   time, one number per image: t = 0 is noise, t = 1 is data
    z   what the network sees:           z = t * x + (1 - t) * e
    v   the velocity of that path:       v = dz/dt = x - e
    y   the image's class label, 0 ... num_classes-1; num_classes itself stands for "no class"

A sampler starts from noise and follows v to the data. Given z and t, any one of x, e and v yields
the other two, so a network may be trained to predict any of them: its *target*. The targets are
algebraically equivalent, but they ask different things of a network. Where the data has little
variance, the best prediction of x is close to a constant, while the best predictions of v and e
still vary with the noise in z, and a network of finite width has to spend capacity on passing that
noise through. (docs/tutorial.md works this out, and says what it does not explain.)

`JLT` is the Transformer, which maps (z, t, y) to a tensor of z's shape. (Inside it, x is the
sequence of tokens and v are an attention head's values.) `Denoiser` defines what that tensor means:
its target, the loss, and the velocity that a sampler follows.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# Model sizes. T is small enough for a laptop; B, L and H are the paper's.
SIZES = {
    "T": dict(hidden_size=128,  depth=6,  num_heads=4,  bottleneck=128),
    "B": dict(hidden_size=768,  depth=12, num_heads=12, bottleneck=128),
    "L": dict(hidden_size=1024, depth=24, num_heads=16, bottleneck=128),
    "H": dict(hidden_size=1280, depth=32, num_heads=16, bottleneck=256),
}


def edm(t, k=0.2):
    """The target of EDM's preconditioning for data of variance k (arXiv 2206.00364, with sigma =
    (1-t)/t), up to a constant factor: x while z is all noise, turning into a multiple of -e close
    to the data, and uncorrelated with z in directions of variance k. k = 0 is x throughout. The
    default suits FLUX.2's latents where a layer is narrower than a token (docs/results.md)."""
    n = ((1 - t) ** 2 + k * t ** 2) ** 0.5
    return (1 - t) / n, -k * t / n


# A target is a row (a, b): the network predicts a * x + b * e. A row may also be a function of t
# that returns (a, b), since everything below holds at each t by itself.
TARGETS = {
    "x":   (1, 0),
    "eps": (0, 1),
    "v":   (1, -1),
    "edm": edm,
}


# -------------------------------------------------------------------------------------------------
# The Transformer

class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + 1e-6) * weight, over the last dimension."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        # Under autocast, CUDA would return fp32, which every following matrix product would cast
        # again. The fused kernel sums the squares in fp32 whatever x is.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


def rotary_table(grid, head_dim):
    """The tables cos and sin of 2-D rotary embedding, each (grid*grid, head_dim), for `rotate`.

    A head's features form pairs. The first half of the pairs rotates with the token's row, the
    second half with its column: pair i of a half by position * 10000^(-2i/d) radians, where d is
    head_dim/2. The product of a rotated query and key depends only on their tokens' relative
    position (arXiv 2104.09864).
    """
    half = head_dim // 2
    frequency = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)  # (half/2,)
    position = torch.arange(grid, dtype=torch.float64)
    angle = position[:, None] * frequency                               # (grid, half/2)
    rows = angle[:, None].expand(grid, grid, -1)                        # (grid, grid, half/2)
    columns = angle[None, :].expand(grid, grid, -1)                     # (grid, grid, half/2)
    angle = torch.cat([rows, columns], dim=-1).flatten(0, 1)            # (tokens, head_dim/2)
    cos, sin = angle.cos().float(), angle.sin().float()
    cos = torch.stack([cos, cos], dim=-1).flatten(1)                    # (tokens, head_dim)
    sin = torch.stack([-sin, sin], dim=-1).flatten(1)                   # (tokens, head_dim)
    return cos, sin


def rotate(x, cos, sin):
    """Rotate each pair (a, b) of features of x (B, N, heads, d) by its angle; cos, sin: (N, 1, d).

    (a cos - b sin, b cos + a sin) = (a, b) * (cos, cos) + (b, a) * (-sin, sin)
    """
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)             # (b, a) of every pair
    return torch.addcmul(x * cos, swapped, sin)                         # x * cos + swapped * sin


class Attention(nn.Module):
    """Multi-head self-attention with rotary embedding and qk-norm (RMSNorm of each head's q, k)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads)
        self.k_norm = RMSNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, cos, sin):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))        # (B, N, 3, heads, d)
        q, k, v = qkv.unbind(2)                                         # each (B, N, heads, d)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))          # each (B, heads, N, d)
        x = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, N, d)
        return self.proj(x.transpose(1, 2).flatten(2))                  # (B, N, dim)


class SwiGLU(nn.Module):
    """The feed-forward layer w3(silu(gate) * value), with gate and value from one matrix product
    (arXiv 2002.05202). Its hidden width is 2/3 of mlp_ratio * dim, so that its three matrices (w12
    holds two) cost as much as the two of a plain MLP."""

    def __init__(self, dim, mlp_ratio):
        super().__init__()
        hidden = int(2 / 3 * mlp_ratio * dim)
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)                      # 2 × (B, N, hidden)
        return self.w3(F.silu(gate) * value)                            # (B, N, dim)


def modulate(x, shift, scale):
    """x * (1 + scale) + shift. x: (B, N, dim); shift, scale: (B, dim), one per image."""
    # addcmul(a, b, c) is a + b * c in one pass over memory, and memory is all that this costs.
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class Block(nn.Module):
    """A Transformer block with adaLN-zero conditioning (DiT, arXiv 2212.09748): the condition c
    shifts and scales the normalised activations and gates both branches. The gates start at 0, so
    a new block is the identity."""

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, cos, sin):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, -1)
        h = self.attn(modulate(self.norm1(x), shift_a, scale_a), cos, sin)
        x = torch.addcmul(x, gate_a[:, None], h)                        # x + gate * h: (B, N, dim)
        h = self.mlp(modulate(self.norm2(x), shift_m, scale_m))
        return torch.addcmul(x, gate_m[:, None], h)                     # (B, N, dim)


class PatchEmbed(nn.Module):
    """Patches to tokens: a patch-sized convolution without bias into a bottleneck, then a 1×1
    convolution to the width, as the paper describes it. With bottleneck 0 it is one convolution, as
    in the release. A patch is read in the order channel, row, column."""

    def __init__(self, patch_size, in_channels, dim, bottleneck):
        super().__init__()
        self.bottleneck = bottleneck
        p = patch_size
        if bottleneck:
            self.proj1 = nn.Conv2d(in_channels, bottleneck, p, stride=p, bias=False)
            self.proj2 = nn.Conv2d(bottleneck, dim, 1)
        else:
            self.proj = nn.Conv2d(in_channels, dim, p, stride=p)

    def forward(self, z):                                               # (B, C, H, W)
        x = self.proj2(self.proj1(z)) if self.bottleneck else self.proj(z)  # (B, dim, H/p, W/p)
        # Without .contiguous() all later activations would be laid out channels first, and slower.
        return x.flatten(2).transpose(1, 2).contiguous()                # (B, N, dim)


class TimeEmbed(nn.Module):
    """Sinusoidal embedding of t in [0, 1], which is not scaled (as in the release), then an MLP.
    Cosines come first, then sines, of 128 frequencies from 1 down to nearly 1/10000."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        i = torch.arange(128, dtype=torch.float32, device=t.device)
        frequency = torch.exp(-math.log(10000) / 128 * i)               # (128,)
        angle = t[:, None].float() * frequency                          # (B, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))  # (B, dim)


class LabelEmbed(nn.Module):
    """A learned vector per class, and one more, number num_classes, for "no class"."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y):
        return self.embedding_table(y)                                  # (B, dim)


class FinalLayer(nn.Module):
    """Tokens back to patches: norm, modulation, and a linear layer that starts at zero."""

    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (B, N, out_dim)


class JLT(nn.Module):
    """The latent diffusion Transformer: (z, t, y) to a prediction of z's shape.

    input_size: height and width of a latent. bottleneck: channels between patch and width, 0 for
    none. The names of the parts (`x_embedder`, although it embeds z) are those of the published
    weights. Raises ValueError for sizes that do not fit together.
    """

    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads,
                 mlp_ratio=4.0, num_classes=1000, bottleneck=128):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not divide a grid of {input_size}")
        if hidden_size % (4 * num_heads):
            raise ValueError(f"width {hidden_size}: expected a multiple of 4 for each head")
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size, bottleneck)
        self.t_embedder = TimeEmbed(hidden_size)
        self.y_embedder = LabelEmbed(num_classes, hidden_size)
        blocks = [Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * in_channels)
        cos, sin = rotary_table(input_size // patch_size, hidden_size // num_heads)
        self.register_buffer("rotary_cos", cos, persistent=False)  # not saved
        self.register_buffer("rotary_sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # in place, by a view
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        # adaLN-zero: gates, shifts and scales start at 0, and so does the output.
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def unpatchify(self, x):
        """Tokens (B, N, p*p*C), each in the order row, column, channel, to (B, C, H, W)."""
        p, grid = self.patch_size, self.input_size // self.patch_size
        x = x.unflatten(-1, (p, p, self.in_channels))                   # (B, N, p, p, C)
        x = x.unflatten(1, (grid, grid))                                # (B, rows, cols, p, p, C)
        x = x.permute(0, 5, 1, 3, 2, 4)                                 # (B, C, rows, p, cols, p)
        return x.flatten(4).flatten(2, 3)                               # (B, C, H, W)

    def forward(self, z, t, y):
        """z: (B, C, H, W); t: (B,) in [0, 1]; y: (B,) int64, num_classes for no class. Returns the
        raw prediction, of z's shape, in z's dtype or autocast's."""
        x = self.x_embedder(z)                                          # (B, N, dim)
        c = self.t_embedder(t) + self.y_embedder(y)                     # (B, dim)
        cos = self.rotary_cos[:, None].to(x.dtype)                      # (N, 1, head_dim)
        sin = self.rotary_sin[:, None].to(x.dtype)                      # (N, 1, head_dim)
        x = self.run_blocks(x, c, cos, sin)                             # (B, N, dim)
        return self.unpatchify(self.final_layer(x, c))                  # (B, C, H, W)

    def run_blocks(self, x, c, cos, sin):
        for block in self.blocks:
            x = block(x, c, cos, sin)
        return x


# -------------------------------------------------------------------------------------------------
# The objective

def coefficients(target: str, t):
    """(a, b) of the target a * x + b * e at time t, a float or a tensor."""
    row = TARGETS[target]
    return row(t) if callable(row) else row


def slope(target: str, t, floor=0.0) -> torch.Tensor:
    """How much the target a*x + b*e changes per unit of v, at fixed z and t: a(1-t) - b*t.

    Since x = z + (1-t) v and e = z - t v, the target is (a+b) z + slope * v. The slope is 1-t for
    x, -t for eps, 1 for v and sqrt((1-t)² + k t²) for edm. All carry the same information; this is
    where they differ.

    t: a float or a tensor. floor: the least magnitude of the result, which keeps its sign. (A slope
    has one sign for all of 0 < t < 1; at t = 1/2 it is (a - b) / 2.)
    """
    a, b = coefficients(target, t)
    s = torch.as_tensor(a * (1 - t) - b * t)
    if not floor:
        return s
    a, b = coefficients(target, 0.5)
    return s.clamp(min=floor) if a > b else s.clamp(max=-floor)


class Denoiser(nn.Module):
    """A network and what its output means: the target, the loss, the velocity.

    target: what the network predicts, a name in TARGETS.
    loss: the space of the squared error, also a name in TARGETS; kept as `.loss_space`. The paper
        always uses "v", whatever the target.
    P_mean, P_std: t = sigmoid(n) with n ~ N(P_mean, P_std²); half of training has t below 0.31.
    t_eps: the least magnitude of the slope that a prediction is divided by, which is 1-t for x and
        t for eps. (The name is the release's; it has nothing to do with the target eps.) Training
        hardly ever draws such times. A sampler does: the floor shortens the last steps of an x
        network, which leaves a little noise, and the first steps of an eps network.
    label_drop: share of training images that get the label "no class", so that the network can be
        guided. Only recorded here; `forward` takes the labels to drop, which train.py draws.

    Raises ValueError for an unknown target, or one whose slope is zero somewhere inside (0, 1).
    """

    def __init__(self, net, target="x", loss="v", P_mean=-0.8, P_std=0.8, t_eps=0.05,
                 label_drop=0.1):
        super().__init__()
        for name in (target, loss):
            if name not in TARGETS:
                raise ValueError(f"{name!r} is no target: expected {', '.join(TARGETS)}")
            slopes = slope(name, torch.linspace(0.01, 0.99, 99))
            if not ((slopes > 0).all() or (slopes < 0).all()):
                raise ValueError(f"target {name!r} says nothing about v at some t, where its slope "
                                 "a(1-t) - bt is zero")
        self.net, self.target, self.loss_space = net, target, loss
        self.P_mean, self.P_std = P_mean, P_std
        self.t_eps, self.label_drop = t_eps, label_drop

    def times(self, normals):
        """Training's times (B,), from standard normals (B,), which train.py draws."""
        return torch.sigmoid(self.P_mean + self.P_std * normals)

    def loss_weight(self, t):
        """w(t) (B,): w * |target - prediction|² is the squared error in the space of the loss.

        Dividing the prediction error by the target's slope gives the velocity error; multiplying by
        the loss space's slope gives the error there.
        """
        if self.target == self.loss_space:  # the floor must not make this less than 1
            return torch.ones_like(t)
        return (slope(self.loss_space, t) / slope(self.target, t, self.t_eps)) ** 2

    def forward(self, x, y, t, e, drop=None) -> torch.Tensor:
        """The training loss, a scalar, of clean latents x (B, C, H, W) fp32 with labels y (B,)
        int64, at times t (B,), with noise e of x's shape. drop: (B,) bool, the labels to drop; None
        drops none. Under autocast everything but the network stays fp32."""
        pred = self.net(self.noised(x, t, e), t, self.with_dropped(y, drop)).float()
        return self.loss(pred, x, t, e)

    def noised(self, x, t, e):
        """z (B, C, H, W) at times t (B,)."""
        t4 = t[:, None, None, None]                                     # (B, 1, 1, 1)
        return t4 * x + (1 - t4) * e

    def with_dropped(self, y, drop):
        """Labels (B,) with "no class" where drop is true."""
        return y if drop is None else torch.where(drop, self.net.num_classes, y)

    def loss(self, pred, x, t, e):
        """The loss, a scalar, of a prediction (B, C, H, W)."""
        a, b = coefficients(self.target, t[:, None, None, None])
        error = (pred - (a * x + b * e)).square().mean(dim=(1, 2, 3))   # (B,)
        return (self.loss_weight(t) * error).mean()

    def to_velocity(self, pred, z, t) -> torch.Tensor:
        """The velocity that a prediction stands for; t: a float or broadcastable to z. (At t = 0 a
        perfect eps prediction is z itself, so with a floor the velocity there is 0.)"""
        t = torch.as_tensor(t, dtype=z.dtype, device=z.device)
        a, b = coefficients(self.target, t)
        return (pred - (a + b) * z) / slope(self.target, t, self.t_eps)

    def velocity(self, z, t, y) -> torch.Tensor:
        """dz/dt at z (B, C, H, W), in fp32; t: a float or (B,); y: (B,) labels."""
        if not torch.is_tensor(t):
            # Filled on the device; copying a float from the CPU would wait for the GPU.
            t = torch.full((len(z),), t, dtype=torch.float32, device=z.device)
        pred = self.net(z, t, y).float()
        return self.to_velocity(pred, z, t[:, None, None, None])
