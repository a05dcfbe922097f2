"""Every number of the training runs of `mini-sdxl` and `mini-pixart`, in frozen, keyword-only dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_PX = 128
LATENT_PX = 16
LATENT_CHANNELS = 4
MAX_TOKENS = 48
MODELS = ("mini-sdxl", "mini-pixart")
MAX_PIPELINE_BYTES = 12 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Shapes, budgets and optimiser settings; raises ValueError when two of them contradict each other."""

    seed: int = 20
    workers: int = 2  # single-threaded processes that average their gradients

    # text encoders: (width, layers, heads); SDXL reads the penultimate layer of each
    text_1_width: int = 64
    text_2_width: int = 96
    text_layers: int = 3
    text_head_dim: int = 32
    text_projection_dim: int = 96

    # UNet
    unet_channels: tuple[int, ...] = (48, 112)
    unet_heads: tuple[int, ...] = (2, 2)
    unet_layers_per_block: int = 1
    unet_transformer_layers: tuple[int, ...] = (1, 2)
    unet_time_id_dim: int = 32

    # VAE
    vae_channels: tuple[int, ...] = (8, 16, 32, 64)
    vae_norm_groups: int = 1  # with one channel per group the last norm would erase a picture's mean colour
    vae_mid_attention: bool = True
    vae_kl_weight: float = 1e-5
    vae_edge_weight: float = 0.3
    vae_lr: float = 2e-3
    vae_batch: int = 16  # 64-pixel crops over all workers; whole pictures come a quarter as many at a time

    # denoiser
    pool_scenes: int = 8_000
    batch: int = 32  # over all workers
    crowded_share: float = 0.5  # of the whole pictures drawn on purpose from scenes of several items
    layout_share: float = 0.3  # of the pictures noised on purpose so much that little but the layout can be told
    close_up_share: float = 0.3  # share of the seconds spent on 8x8 windows, three times as many per batch
    lr: float = 1e-3
    warmup_steps: int = 150
    weight_decay: float = 0.01
    ema_decay: float = 0.9995
    caption_dropout: float = 0.10
    reading_weight: float = 0.1  # of what throw-away heads must read, in nats
    text_warmup_steps: int = 400

    def __post_init__(self) -> None:
        for width, heads in zip(self.unet_channels, self.unet_heads, strict=True):
            if width % heads:
                raise ValueError(f"UNet width {width} does not divide into {heads} heads")
        for width in (self.text_1_width, self.text_2_width):
            if width % self.text_head_dim:
                raise ValueError(f"text width {width} is not a multiple of head dim {self.text_head_dim}")
        if len(self.unet_transformer_layers) != len(self.unet_channels):
            raise ValueError(
                f"{len(self.unet_channels)} UNet widths but {len(self.unet_transformer_layers)} transformer depths"
            )

    @property
    def cross_attention_dim(self) -> int:
        return self.text_1_width + self.text_2_width


@dataclass(frozen=True, kw_only=True)
class PixArtSettings:
    """`mini-pixart`: shapes and optimiser settings of the transformer; the autoencoder is that of `mini-sdxl`."""

    seed: int = 21
    workers: int = 2

    # text encoder
    text_width: int = 128
    text_hidden: int = 256
    text_layers: int = 3
    text_head_dim: int = 32
    text_warmup_steps: int = 500

    # transformer
    width: int = 192
    head_dim: int = 32
    layers: int = 7
    patch: int = 2

    # training
    batch: int = 32  # over all workers
    crowded_share: float = 0.5  # of the whole pictures drawn on purpose from scenes of several items
    layout_share: float = 0.3  # of the pictures noised on purpose so much that little but the layout can be told
    close_up_share: float = 0.2  # share of the seconds spent on 8x8 windows, three times as many per batch
    lr: float = 1e-3
    warmup_steps: int = 300
    weight_decay: float = 0.01
    ema_decay: float = 0.9995
    caption_dropout: float = 0.10
    variance_weight: float = 0.01  # of the variational bound that trains the variance, in bits
    reading_layer: int = 4  # blocks after which a throw-away head must know what every token shows
    reading_weight: float = 0.1  # of that, in nats


SETTINGS = Settings()
PIXART_SETTINGS = PixArtSettings()
