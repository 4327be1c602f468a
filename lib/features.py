"""Vision backbones of the transformers package as feature extractors: CLIP, DINOv2 with and without
registers, DINOv3, and other Vision Transformers that AutoModel opens.

fid.py measures with them (CMMD, DINO-MMD), ablations/repa.py learns from them. Features are only
comparable where the network and the image size are the same.
"""
import inspect
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.run import BadInput

# Mean and standard deviation of RGB in [0, 1], as CLIP and as networks trained on ImageNet want it.
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(nn.Module):
    """forward(uint8 images (B, 3, H, W)) -> (embedding (B, E), patch tokens (B, T, D)).

    The embedding is the class token after the final norm; for CLIP it is the image embedding, which
    is that token projected. Patch tokens come row by row and after the final norm; CLIP's have
    none. Register tokens are left out. Of a rectangular image only the central square is seen.
    """

    def __init__(self, net, size=None):
        """net: a transformers model. size: the side in pixels that images are resized to, by
        default the one that the network was made for."""
        super().__init__()
        self.net, self.is_clip = net, net.config.model_type.startswith("clip")
        self.size = size or net.config.image_size
        self.first_patch = 1 + getattr(net.config, "num_register_tokens", 0)
        self.options = {}
        # CLIP and ViT refuse other sizes unless asked to interpolate; DINO needs no asking.
        if "interpolate_pos_encoding" in inspect.signature(net.forward).parameters:
            self.options["interpolate_pos_encoding"] = self.size != net.config.image_size
        mean, std = torch.tensor(CLIP if self.is_clip else IMAGENET)[:, :, None, None]
        self.register_buffer("mean", mean, persistent=False)            # (3, 1, 1)
        self.register_buffer("std", std, persistent=False)

    def preprocess(self, images):
        """uint8 (B, 3, H, W) to normalised fp32 (B, 3, size, size). CLIP's authors antialias when
        they resize; for DINO it was not done here, and its features would change."""
        side = min(images.shape[-2:])
        top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
        x = images[..., top:top + side, left:left + side].float() / 255
        if side != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=self.is_clip)
        return (x - self.mean) / self.std

    @torch.no_grad()  # not inference_mode: a loss on a student may use the features
    def forward(self, images):
        output = self.net(pixel_values=self.preprocess(images), **self.options)
        tokens = output.last_hidden_state                               # (B, 1 + registers + T, D)
        embedding = output.image_embeds if self.is_clip else tokens[:, 0]
        return embedding, tokens[:, self.first_patch:]


def load_features(name, size=None, device="cpu") -> Features:
    """Features in eval mode and fp32 from a Hugging Face id or a folder. size: the side in pixels
    that images are resized to, by default the network's own (CLIP 336, DINOv2 518). Raises BadInput
    where transformers is not installed or the weights cannot be used."""
    try:
        import transformers
    except ImportError:
        raise BadInput(f"{name} needs the transformers package: pip install transformers") from None
    transformers.logging.set_verbosity_error()  # what matters of its reports is checked below
    transformers.utils.logging.disable_progress_bar()
    source = os.path.expanduser(name)
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type.startswith("clip"):
            kind = transformers.CLIPVisionModelWithProjection
        else:
            kind = transformers.AutoModel
        net, report = kind.from_pretrained(
            source, trust_remote_code=False, output_loading_info=True)
        net.pooler = None  # some files lack its weights, and nothing here uses it
        missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
        if missing:  # transformers would leave them at random values
            raise ValueError(f"the file lacks {len(missing)} tensors, such as {missing[0]}")
        features = Features(net.float().eval().requires_grad_(False), size)
        _, tokens = features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
        patches = (features.size // net.config.patch_size) ** 2
        if tokens.shape[1] != patches:
            raise ValueError(f"{tokens.shape[1]} patch tokens after the class token, expected "
                             f"{patches}")
    except Exception as error:  # transformers raises errors of many kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise BadInput(f"{name}: expected the Hugging Face id or the folder of a vision backbone "
                       f"that transformers opens ({reason})") from None
    return features.to(device)
