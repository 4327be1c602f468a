"""The network and the objective of JLT (arXiv 2605.27102: "Clean-Latent Prediction in Latent Diffusion Transformers").

The legend, kept to by every file here:

    x   the clean latent of an image, shape (B, C, H, W)
    e   noise of the same shape, e ~ N(0, I)                    (the paper's epsilon)
    t   time, one number per image: t = 0 is noise, t = 1 is data
    z   what the network sees:           z = t * x + (1 - t) * e
    v   the velocity of that path:       v = dz/dt = x - e
    y   the image's class label, 0 ... num_classes-1; the label num_classes stands for "no class"

(Inside the Transformer, x is the sequence of tokens, and v an attention head's values, as everywhere.)

A sampler starts from noise and follows v to the data. Of x, e and v any one, with z and t, gives the other two, so a
network may be asked for any of them: its *target*. What is the same in algebra is not the same for a network of finite
size. Images lie near a surface of few dimensions, latents less so; noise fills every dimension there is. Predicting x,
the network may forget what lies off the surface; predicting v or e, it has to carry all of that noise through to its
output.

Two parts: `JLT`, a Transformer that maps (z, t, label) to a tensor of z's shape, and knows nothing of what it means;
`Denoiser`, which gives that tensor a meaning (the target), a loss to train with, and a velocity to sample with.
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
TARGETS = ("x", "eps", "v")


# ---------------------------------------------------------------------------------------------------------------------
# The Transformer

class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + 1e-6) * weight, over the last dimension."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        # In x's dtype throughout, by the fused kernel: autocast on CUDA would go to fp32 here, and stay in it. (The
        # kernel sums the squares in fp32 all the same.)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


def rotary_table(grid, head_dim):
    """Rotation of each token's features by its position on the grid: cos and sin, each (grid*grid, head_dim).

    A head's features come in pairs. The first half of the pairs turns with the token's row, the second with its column,
    pair i of a half by position * 10000^(-2i/d), d = head_dim/2. A dot product of two rotated vectors then depends on
    where the tokens lie relative to each other ("RoFormer", arXiv 2104.09864, in two dimensions). Both places of a pair
    hold its cosine; the first holds minus its sine, the second its sine, as `rotate` wants them.
    """
    half = head_dim // 2
    frequency = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)         # (half/2,)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency                   # (grid, half/2)
    rows = angle[:, None, :].expand(grid, grid, -1)
    columns = angle[None, :, :].expand(grid, grid, -1)
    angle = torch.cat([rows, columns], dim=-1).reshape(grid * grid, half)                  # (tokens, head_dim/2)
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.stack([cos, cos], dim=-1).flatten(1), torch.stack([-sin, sin], dim=-1).flatten(1)


def rotate(x, cos, sin):
    """Turn each pair (a, b) = (x[2i], x[2i+1]) of the features by its angle: (a cos - b sin, b cos + a sin), that is
    (a, b) * (cos, cos) + (b, a) * (-sin, sin). x: (..., head_dim); cos, sin: rotary_table's, broadcastable to x."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)


class Attention(nn.Module):
    """Multi-head self-attention with qk-norm (a norm of each head's queries and keys) and rotary positions."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads)
        self.k_norm = RMSNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)            # 3 × (B, N, heads, head_dim)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))                            # 3 × (B, heads, N, head_dim)
        x = F.scaled_dot_product_attention(q, k, v)                                        # (B, heads, N, head_dim)
        return self.proj(x.transpose(1, 2).flatten(2))                                     # (B, N, dim)


class SwiGLU(nn.Module):
    """The feed-forward part: w3(silu(gate) * value), gate and value from one product (arXiv 2002.05202). A third matrix
    is paid for by making the hidden width two thirds of the usual mlp_ratio * dim."""

    def __init__(self, dim, mlp_ratio):
        super().__init__()
        hidden = int(2 / 3 * mlp_ratio * dim)
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def modulate(x, shift, scale):
    """adaLN's use of the condition: one shift and one scale per image and channel. x: (B, N, dim); others (B, dim)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class Block(nn.Module):
    """A Transformer block whose norms and residual branches are steered by the condition c (adaLN-zero, from DiT,
    arXiv 2212.09748). The modulation starts at zero, so both gates do and a new block is the identity."""

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, cos, sin):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=-1)  # each (B, dim)
        x = torch.addcmul(x, gate_a[:, None], self.attn(modulate(self.norm1(x), shift_a, scale_a), cos, sin))
        x = torch.addcmul(x, gate_m[:, None], self.mlp(modulate(self.norm2(x), shift_m, scale_m)))
        return x                                                                           # (B, N, dim)


class PatchEmbed(nn.Module):
    """Patches to tokens: a convolution without bias into a bottleneck, then 1×1 up to the width. A patch of p*p latent
    pixels with C channels holds p*p*C numbers; what is worth keeping of them is less (at p = 1 and C = 128 the paper's
    bottleneck of 128 lets all of them through). Without one, a single convolution (the paper's release). A convolution
    reads its patch in the order channel, row, column."""

    def __init__(self, patch_size, in_channels, dim, bottleneck):
        super().__init__()
        if bottleneck:
            self.proj1 = nn.Conv2d(in_channels, bottleneck, patch_size, stride=patch_size, bias=False)
            self.proj2 = nn.Conv2d(bottleneck, dim, 1)
        else:
            self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, z):
        x = self.proj2(self.proj1(z)) if hasattr(self, "proj1") else self.proj(z)          # (B, dim, H/p, W/p)
        return x.flatten(2).transpose(1, 2)                                                # (B, N, dim)


class TimeEmbed(nn.Module):
    """t in [0, 1], unscaled as in the release, to a vector: cosines, then sines, of 128 frequencies, then an MLP."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        frequency = torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float32, device=t.device))
        angle = t[:, None].float() * frequency                                             # (B, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))                     # (B, dim)


class LabelEmbed(nn.Module):
    """A learned vector per class and a last one, number num_classes, that stands for "no class"."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y):
        return self.embedding_table(y)                                                     # (B, dim)


class FinalLayer(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))                     # (B, N, out_dim)


class JLT(nn.Module):
    """The latent diffusion Transformer: (z, t, y) to a prediction of z's shape.

    input_size: height and width of a latent; patch_size divides it. mlp_ratio: feed-forward width before SwiGLU's two
    thirds. bottleneck: channels between patch and width, 0 for none. The state dict has the published weights' names.
    """

    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio=4.0,
                 num_classes=1000, bottleneck=128):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not divide the {input_size}×{input_size} grid")
        if hidden_size % (4 * num_heads):
            raise ValueError(f"width {hidden_size} over {num_heads} heads: 2-D rotation needs a multiple of 4 each")
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.num_classes = in_channels, num_classes
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size, bottleneck)
        self.t_embedder = TimeEmbed(hidden_size)
        self.y_embedder = LabelEmbed(num_classes, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * in_channels)
        cos, sin = rotary_table(input_size // patch_size, hidden_size // num_heads)
        self.register_buffer("rotary_cos", cos, persistent=False)  # computed, so not part of the weights
        self.register_buffer("rotary_sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a patch convolution is a matrix over patches
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.y_embedder.embedding_table):
            nn.init.normal_(module.weight, std=0.02)
        # adaLN-zero: gates, shifts and scales start at 0, and so does the output: a new network predicts exactly 0.
        for linear in (*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1],
                       self.final_layer.linear):
            nn.init.zeros_(linear.weight)

    def unpatchify(self, x):
        """Tokens (B, N, p*p*C), each in the order row, column, channel, to (B, C, H, W)."""
        p, grid = self.patch_size, self.input_size // self.patch_size
        x = x.unflatten(1, (grid, grid)).unflatten(-1, (p, p, self.in_channels))           # (B, rows, cols, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                        # (B, C, rows*p, cols*p)

    def forward(self, z, t, y):
        """z: (B, C, H, W); t: (B,) in [0, 1]; y: (B,) int64, 0 ... num_classes-1, or num_classes for no class.
        Returns the raw prediction, z's shape; its dtype is z's, or autocast's."""
        x = self.x_embedder(z)                                                             # (B, N, dim)
        c = self.t_embedder(t) + self.y_embedder(y)                                        # (B, dim)
        cos, sin = (table[:, None].to(x.dtype) for table in (self.rotary_cos, self.rotary_sin))  # (N, 1, head_dim)
        for block in self.blocks:
            x = block(x, c, cos, sin)                                                      # (B, N, dim)
        return self.unpatchify(self.final_layer(x, c))                                     # (B, C, H, W)


# ---------------------------------------------------------------------------------------------------------------------
# The objective

class Denoiser(nn.Module):
    """A network and what its output means: the target it predicts, the loss it learns by, the velocity it gives.

    target: what the network predicts, "x", "eps" or "v".
    loss: the space in which the squared error is taken, "v" in the paper whatever the target.
    P_mean, P_std: t = sigmoid(n), n ~ N(P_mean, P_std²): training dwells on noisy times (t around 0.3).
    t_eps: floor of the denominators, 1-t for x and t for eps, since 1/(1-t) and 1/t grow without bound. In training
        such times are rare, and it hardly acts. In sampling it does: with target x it shortens the last steps, so that
        a little noise stays; with target eps, the first. sample.py --t-eps changes it.
    label_drop: share of training images whose label is replaced by "no class", for guidance.
    """

    def __init__(self, net, target="x", loss="v", P_mean=-0.8, P_std=0.8, t_eps=0.05, label_drop=0.1):
        super().__init__()
        for name, value in {"target": target, "loss": loss}.items():
            if value not in TARGETS:
                raise ValueError(f"{name} {value!r}: expected one of {', '.join(TARGETS)}")
        self.net, self.target, self.loss = net, target, loss
        self.P_mean, self.P_std, self.t_eps, self.label_drop = P_mean, P_std, t_eps, label_drop

    def times(self, normals):
        """Logit-normal times, from standard normals of any shape."""
        return torch.sigmoid(self.P_mean + self.P_std * normals)

    def loss_weight(self, t):
        """w(t), by which |target - prediction|² becomes the squared error in the space of the loss: 3 × 3 losses.

        Put prediction and target through the same conversion and z cancels: only a factor stays. With an error of the
        velocity dv, the error of x is (1-t) dv and that of e is t dv (e = z - t v). So, first to v, then to the loss:
        """
        if self.target == self.loss:
            return torch.ones_like(t)
        to_v = {"x": 1 / (1 - t).clamp(min=self.t_eps), "eps": 1 / t.clamp(min=self.t_eps), "v": 1}[self.target]
        from_v = {"x": 1 - t, "eps": t, "v": 1}[self.loss]
        return (to_v * from_v) ** 2

    def forward(self, x, y, t=None, e=None, drop=None):
        """The training loss, a scalar, of clean latents x (B, C, H, W) with labels y (B,) int64.

        t (B,), e (x's shape) and drop (B,) bool, the labels to hide, are drawn where they are not given; in eval mode
        no label is dropped unless `drop` says so. The network alone runs under the caller's autocast.
        """
        if t is None:
            t = self.times(torch.randn(len(x), device=x.device))
        if e is None:
            e = torch.randn_like(x)
        if drop is None:
            drop = torch.rand(len(x), device=x.device) < self.label_drop * self.training
        t_ = t[:, None, None, None]                                                        # (B, 1, 1, 1)
        z = t_ * x + (1 - t_) * e
        y = torch.where(drop, self.net.num_classes, y)
        target = {"x": x, "eps": e, "v": x - e}[self.target]
        error = (target - self.net(z, t, y).float()).square().mean(dim=(1, 2, 3))          # (B,)
        return (self.loss_weight(t) * error).mean()

    def to_velocity(self, pred, z, t):
        """The velocity that a prediction stands for; t a float or broadcastable to z. From z = t x + (1-t) e:
        v = (x - z) / (1 - t) = (z - e) / t, with floored denominators. (At t = 0, z is e itself: a perfect eps
        prediction equals z there, and the velocity comes out as 0.)"""
        t = torch.as_tensor(t, dtype=z.dtype, device=z.device)
        if self.target == "x":
            return (pred - z) / (1 - t).clamp(min=self.t_eps)
        if self.target == "eps":
            return (z - pred) / t.clamp(min=self.t_eps)
        if self.target == "v":
            return pred
        raise NotImplementedError(f"the velocity from {self.target}")

    def velocity(self, z, t, y):
        """dz/dt at z (B, C, H, W), in fp32; t a float or (B,); y (B,) labels."""
        if not torch.is_tensor(t):  # written on the device: a copy from the CPU would wait for it
            t = torch.full((len(z),), t, dtype=torch.float32, device=z.device)
        return self.to_velocity(self.net(z, t, y).float(), z, t[:, None, None, None])
