"""The network and the objective of JLT (arXiv 2605.27102). The legend, kept to by every file here:

    x   the clean latent of an image, shape (B, C, H, W)
    e   noise of the same shape, e ~ N(0, I)                    (the paper's epsilon)
    t   time, one number per image: t = 0 is noise, t = 1 is data
    z   what the network sees:           z = t * x + (1 - t) * e
    v   the velocity of that path:       v = dz/dt = x - e
    y   the image's class label, 0 ... num_classes-1; num_classes itself stands for "no class"

A sampler starts from noise and follows v to the data. Given z and t, any one of x, e and v gives
the other two, so a network may be asked for any of them: its *target*. In algebra the three are
equivalent. For a network of finite width they are not. Images lie near a surface of few dimensions,
latents less so, but noise fills every dimension. A network that predicts x may forget what lies off
the surface. One that predicts v or e has to carry all of the noise through to its output.

`JLT` is the Transformer, which maps (z, t, y) to a tensor of z's shape (inside it x is the sequence
of tokens, v a head's values). `Denoiser` gives that tensor a meaning, a loss and a velocity.
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

# A target is a row (a, b): the network predicts a * x + b * e.
TARGETS = {
    "x":   (1, 0),
    "eps": (0, 1),
    "v":   (1, -1),
}


# -------------------------------------------------------------------------------------------------
# The Transformer

class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + 1e-6) * weight, over the last dimension."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        # Autocast on CUDA would return fp32, to be cast again by every product after it. (The
        # fused kernel sums the squares in fp32 whatever x is.)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


def rotary_table(grid, head_dim):
    """cos and sin, each (grid*grid, head_dim), by which `rotate` turns each token's features.

    A head's features come in pairs. The first half of the pairs turns with the token's row, the
    second with its column: pair i of a half by position * 10000^(-2i/d) radians, d = head_dim/2. A
    product of two turned vectors depends on their tokens' relative place (arXiv 2104.09864).
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
    """Turn each pair (a, b) of features of x (B, N, heads, d) by its angle; cos, sin: (N, 1, d).
    (a cos - b sin, b cos + a sin) = (a, b) * (cos, cos) + (b, a) * (-sin, sin)."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)             # (b, a) of every pair
    return torch.addcmul(x * cos, swapped, sin)                         # x * cos + swapped * sin


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions and qk-norm (of each head's q and k)."""

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
    """The feed-forward part: w3(silu(gate) * value), gate and value from one product (arXiv
    2002.05202). At 2/3 of the width mlp_ratio * dim, three matrices cost what two would."""

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
    # addcmul(a, b, c) is a + b * c in one pass: moving memory is all that this costs.
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class Block(nn.Module):
    """A Transformer block. The condition c shifts and scales what the norms give, and gates both
    branches (adaLN-zero, from DiT, arXiv 2212.09748): a new block, its gates 0, is the identity."""

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
    """Patches to tokens: a convolution without bias into a bottleneck, then 1×1 up to the width.
    The bottleneck drops what a patch can spare (at p = 1, FLUX.2's 128 channels pass whole); 0 is
    none, as in the release. A patch is read in the order channel, row, column."""

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
        # Contiguous: or all that comes after would lie channel by channel, and a step take longer.
        return x.flatten(2).transpose(1, 2).contiguous()                # (B, N, dim)


class TimeEmbed(nn.Module):
    """t in [0, 1] (unscaled, as in the release) to a vector: cosines, then sines, of 128
    frequencies, from 1 down to nearly 1/10000, then an MLP."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        i = torch.arange(128, dtype=torch.float32, device=t.device)
        frequency = torch.exp(-math.log(10000) / 128 * i)               # (128,)
        angle = t[:, None].float() * frequency                          # (B, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))  # (B, dim)


class LabelEmbed(nn.Module):
    """A learned vector per class, and a last one, number num_classes, for "no class"."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y):
        return self.embedding_table(y)                                  # (B, dim)


class FinalLayer(nn.Module):
    """From the width back to the numbers of a patch."""

    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (B, N, out_dim)


class JLT(nn.Module):
    """The latent diffusion Transformer: (z, t, y) to a prediction of z's shape. input_size: height
    and width of a latent. bottleneck: channels between patch and width, 0 for none. The parts'
    names (`x_embedder`, although it embeds z) are those of the published weights."""

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
        self.register_buffer("rotary_cos", cos, persistent=False)  # computed: not saved
        self.register_buffer("rotary_sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a convolution as a matrix
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
        for block in self.blocks:
            x = block(x, c, cos, sin)                                   # (B, N, dim)
        return self.unpatchify(self.final_layer(x, c))                  # (B, C, H, W)


# -------------------------------------------------------------------------------------------------
# The objective

def slope(target: str, t, floor=0.0) -> torch.Tensor:
    """How much a target a*x + b*e moves when v moves by one, at fixed z and t: a(1-t) - b*t.

    Since x = z + (1-t) v and e = z - t v, the target is (a+b) z + slope * v. The slope is 1-t for
    x, -t for eps, 1 for v: the targets carry the same information, and this is what differs.

    t: a tensor or a float. floor: the least size of the result, its sign kept. a and b must not
    have the same sign, or the slope would vanish inside (0, 1).
    """
    a, b = TARGETS[target]
    s = torch.as_tensor(a * (1 - t) - b * t)
    return s.clamp(min=floor) if a > b else s.clamp(max=-floor)  # a > b: it is positive


class Denoiser(nn.Module):
    """A network and what its output means: the target, the loss, the velocity.

    target: what the network predicts. loss: the space of the squared error (`.loss_space`), in the
        paper "v" whatever the target. Both are names of TARGETS.
    P_mean, P_std: t = sigmoid(n), n ~ N(P_mean, P_std²): training dwells on t around 0.3.
    t_eps: floor of the slope's size, by which predictions are divided: of 1-t for x, of t for eps.
        Training hardly draws such times. Sampling, it shortens an x network's last steps (a little
        noise stays) and an eps network's first.
    label_drop: share of training images whose label is hidden, for guidance. train.py picks them.
    """

    def __init__(self, net, target="x", loss="v", P_mean=-0.8, P_std=0.8, t_eps=0.05,
                 label_drop=0.1):
        super().__init__()
        if target not in TARGETS or loss not in TARGETS:
            raise ValueError(f"target {target!r}, loss {loss!r}: expected of {', '.join(TARGETS)}")
        self.net, self.target, self.loss_space = net, target, loss
        self.P_mean, self.P_std = P_mean, P_std
        self.t_eps, self.label_drop = t_eps, label_drop
        self.mean_latent = None  # (C, H, W), of the data, where known: for sample.py --contrast

    def times(self, normals):
        """Logit-normal times from standard normals (which train.py draws)."""
        return torch.sigmoid(self.P_mean + self.P_std * normals)

    def loss_weight(self, t):
        """w(t), by which |target - prediction|² becomes the squared error in the loss's space. (An
        error of the prediction, over the target's slope, is one of v; times the loss's, of that.)
        """
        if self.target == self.loss_space:  # without the floor, which would make it less than 1
            return torch.ones_like(t)
        return (slope(self.loss_space, t) / slope(self.target, t, self.t_eps)) ** 2

    def forward(self, x, y, t, e, drop=None) -> torch.Tensor:
        """The training loss, a scalar, of clean latents x (B, C, H, W) fp32 with labels y (B,)
        int64, at times t (B,), with noise e (x's shape). drop: (B,) bool, the labels to hide; None
        hides none. Under autocast all but the network stays fp32."""
        if drop is not None:
            y = torch.where(drop, self.net.num_classes, y)
        t4 = t[:, None, None, None]                                     # (B, 1, 1, 1)
        z = t4 * x + (1 - t4) * e                                       # (B, C, H, W)
        return self.loss(self.net(z, t, y).float(), x, t, e)

    def loss(self, pred, x, t, e):
        """The loss of a prediction (B, C, H, W)."""
        a, b = TARGETS[self.target]
        error = (pred - (a * x + b * e)).square().mean(dim=(1, 2, 3))   # (B,)
        return (self.loss_weight(t) * error).mean()

    def to_velocity(self, pred, z, t) -> torch.Tensor:
        """The velocity that a prediction stands for; t a float or broadcastable to z. (At t = 0 a
        perfect eps prediction is z itself: with a floor, the velocity is then 0.)"""
        t = torch.as_tensor(t, dtype=z.dtype, device=z.device)
        a, b = TARGETS[self.target]
        return (pred - (a + b) * z) / slope(self.target, t, self.t_eps)

    def velocity(self, z, t, y) -> torch.Tensor:
        """dz/dt at z (B, C, H, W), in fp32; t a float or (B,); y (B,) labels."""
        if not torch.is_tensor(t):
            # Filled on the device: a copy from the CPU would wait for it.
            t = torch.full((len(z),), t, dtype=torch.float32, device=z.device)
        pred = self.net(z, t, y).float()
        return self.to_velocity(pred, z, t[:, None, None, None])
