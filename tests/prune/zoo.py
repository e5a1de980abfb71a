"""Small networks that are awkward to prune, each with what is awkward; all take images of 8 or 16 pixels."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autocompress.models.mobilenet_v2 import mobilenet_v2_cifar
from autocompress.models.resnet_cifar import ResNetCifar, resnet20
from autocompress.models.vgg import vgg16_bn_cifar
from autocompress.prune.source import Source


def conv(entering: int, leaving: int, kernel: int = 3, **settings: int | str) -> nn.Sequential:
    """Convolution, batch norm, ReLU; the size stays unless settings say otherwise."""
    padding = settings.pop("padding", kernel // 2)
    layer = nn.Conv2d(entering, leaving, kernel, padding=padding, bias=False, **settings)  # type: ignore[arg-type]
    return nn.Sequential(layer, nn.BatchNorm2d(leaving), nn.ReLU(inplace=True))


class Head(nn.Module):
    """Mean of the map and a linear layer."""

    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Dense(nn.Module):
    """Concatenations of everything before, as DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * n) for n in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(6 + 4 * n, 4, 3, padding=1, bias=False) for n in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 8, 1), nn.AvgPool2d(2))
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            maps.append(layer(F.relu(norm(torch.cat(maps, 1)))))
        return self.head(self.transition(torch.cat(maps, 1)))


class Inception(nn.Module):
    """Branches of different widths and kernels, joined by a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.one = conv(8, 4, 1)
        self.two = nn.Sequential(
            nn.Conv2d(8, 6, (1, 7), padding=(0, 3)),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 10, (7, 1), padding=(3, 0)),
        )
        self.three = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(8, 2, 1))
        self.after = conv(16, 6)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.after(torch.cat([self.one(x), self.two(x), self.three(x)], dim=1)))


class Chunks(nn.Module):
    """Halves of a map take different ways, as in C2f and CSP blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.inner = conv(6, 6)
        self.last = conv(18, 10, 1)
        self.split = conv(10, 12, 1)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.stem(x).chunk(2, 1)
        x = self.split(self.last(torch.cat([one, two, self.inner(two)], 1)))
        a, b, c = x.split(x.shape[1] // 3, dim=1)
        return self.head(a * torch.sigmoid(b) + c)


class Depthwise(nn.Module):
    """Depthwise convolutions, one with two outputs a channel, one of a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.twice = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.point = conv(12, 8, 1)
        self.both = conv(14, 14, 5, groups=14)
        self.head = Head(14)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.both(torch.cat([x, self.point(F.relu6(self.twice(x)))], 1)))


class Grouped(nn.Module):
    """Grouped convolutions between others, and two in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = conv(3, 12, 1)
        self.grouped = conv(12, 18, 3, groups=3)
        self.again = conv(18, 12, 3, groups=2)
        self.expand = conv(12, 8, 1)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.expand(self.again(self.grouped(self.reduce(x)))))


class SqueezeExcite(nn.Module):
    """Channel attention by linear layers and by convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = conv(3, 8)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        self.two = conv(8, 10)
        self.reduce, self.expand = nn.Conv2d(10, 6, 1), nn.Conv2d(6, 10, 1)
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        n, c = x.shape[:2]
        gate = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1).view(n, c)))).sigmoid()
        x = self.two(x * gate.view(n, c, 1, 1))
        gate = F.hardsigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.head(x * gate.expand_as(x))


class Shared(nn.Module):
    """One convolution and its batch norm used twice, on maps of two sizes; weights of two layers tied."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.shared = conv(8, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(F.max_pool2d(self.shared(self.stem(x)), 2))
        return self.head(self.second(F.relu(self.first(x.amax((2, 3))))))


class Scales(nn.Module):
    """PReLU, a scale for each layer, parameters in views, in an exponential, and one for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 1e-6))
        self.flat = nn.Parameter(torch.randn(8))
        self.log = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.alpha = nn.Parameter(torch.zeros(1))
        self.place = nn.Parameter(torch.randn(1, 8, 8, 8))
        self.slope = nn.PReLU()
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x)) + self.place
        x = x + self.gamma * self.body(x) * self.flat.view(1, -1, 1, 1)
        return self.head(self.slope(x + self.alpha * torch.exp(self.log) * x))


class PreActivation(nn.Module):
    """Batch norm before convolutions, which see what an addition gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, 2, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(8, 16, 1, 2, bias=False)
        self.last = nn.BatchNorm2d(16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        y += self.shortcut(x)
        return self.head(F.relu(self.last(y)))


class Flatten(nn.Module):
    """A linear head that reads all pixels of two concatenated maps, and batch norm of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.norm = nn.BatchNorm1d(192)
        self.hidden, self.norm2 = nn.Linear(192, 10, bias=False), nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.p(x), self.q(x)], 1)
        return self.head(F.relu(self.norm2(self.hidden(self.norm(torch.flatten(self.pool(x), 1))))))


class Geometry(nn.Module):
    """Dilation, 'same' and 'valid' padding, even and long kernels, padding by the other functions."""

    def __init__(self) -> None:
        super().__init__()
        self.dilated = conv(3, 6, 3, dilation=2, padding=2)
        self.same = nn.Conv2d(6, 7, (4, 2), padding="same", dilation=(1, 3))
        self.valid = nn.Conv2d(7, 6, (1, 3), padding="valid", stride=(1, 2))
        self.mirror = nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect")
        self.ahead = nn.ZeroPad2d((1, 0, 2, 0))
        self.even = nn.Conv2d(8, 6, 2, stride=2)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.valid(F.gelu(self.same(self.dilated(x))))
        x = self.ahead(F.leaky_relu(self.mirror(x), 0.1))
        return self.head(F.pad(self.even(x), (-1, 0), mode="constant"))


class Shuffle(nn.Module):
    """Channel shuffle, by hand and by PyTorch's module, and halves of channels, as ShuffleNet V2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.branch = conv(6, 6, 1)
        self.mix = conv(12, 12, 1)
        self.own = nn.ChannelShuffle(3)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.stem(x).chunk(2, dim=1)
        x = torch.cat([one, self.branch(two)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.head(self.own(self.mix(x)))


class Growing(nn.Module):
    """Transposed convolutions, plain, depthwise and grouped; pixel shuffle there and back; interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, 3, stride=2)
        self.up = nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.own = nn.ConvTranspose2d(6, 12, 2, 2, groups=6)
        self.grouped = nn.ConvTranspose2d(12, 8, 3, padding=1, groups=2)
        self.point = nn.Conv2d(8, 24, 1)
        self.shuffle, self.back = nn.PixelShuffle(2), nn.PixelUnshuffle(4)
        self.last = nn.Conv2d(96, 6, 1)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.own(F.relu(self.norm(self.up(self.stem(x))))))
        x = F.interpolate(self.shuffle(self.point(x)), scale_factor=0.5, mode="bilinear", align_corners=False)
        return self.head(self.last(self.back(x)))


class Gates(nn.Module):
    """A gated linear unit of channels, maxima of two maps, and attention over positions by one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.one, self.two = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 3, padding=1)
        self.mask = nn.Conv2d(8, 1, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.stem(x), dim=1)
        x = torch.maximum(self.one(x), self.two(x))
        weights = self.mask(x).flatten(2).softmax(-1)
        return self.head((x.flatten(2) * weights).sum(-1))


class Tokens(nn.Module):
    """Linear layers on the last axis of positions and channels, and along positions, as an MLP-Mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.mix, self.back = nn.Linear(16, 6), nn.Linear(6, 16)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.back(F.gelu(self.mix(x.transpose(1, 2)))).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


class Decoder(nn.Module):
    """A vector that becomes a map."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3 * 64, 10)
        self.decode = nn.Linear(10, 6 * 16)
        self.after = conv(6, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.decode(F.relu(self.encode(x.flatten(1))))
        return self.head(self.after(x.view(x.shape[0], -1, 4, 4)))


class Padded(nn.Module):
    """Shortcuts that add channels of zeros (option A of ResNet), in numbers that do not follow the widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.body = nn.Sequential(conv(6, 8, 3, stride=2), nn.Conv2d(8, 10, 3, padding=1))
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.body(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))


class Own(nn.Module):
    """Weights that belong to no layer of PyTorch, two of them in one module, and buffers of constants."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.two = nn.Parameter(torch.randn(6, 8, 1, 1) / 3)
        self.register_buffer("mean", torch.randn(1, 3, 1, 1))
        self.register_buffer("steady", torch.rand(8, 1, 1), persistent=False)
        self.head = Head(6)
        self.norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.plain = nn.BatchNorm2d(6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x - self.mean, self.one, padding=1) * self.steady
        return self.head(self.plain(self.norm(F.conv2d(torch.tanh(x), self.two))))


class Norms(nn.Module):
    """Group norm and layer norm over channels, which keep theirs, between layers that are narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.grouped, self.group = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.middle = conv(8, 10)
        self.layered, self.layer = nn.Conv2d(10, 6, 1), nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layered(self.middle(self.group(self.grouped(self.stem(x)))))
        return self.head(F.relu(self.hidden(self.layer(x.permute(0, 2, 3, 1)).mean((1, 2)))))


class Constants(nn.Module):
    """A view that has numbers for sizes, and one that has not."""

    def __init__(self) -> None:
        super().__init__()
        self.free = conv(3, 8)
        self.bound = conv(8, 6, 3, stride=2)
        self.hidden = nn.Linear(6 * 16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bound(self.free(x))
        return self.head(F.relu(self.hidden(x.view(-1, 96))))


class Slices(nn.Module):
    """The first four channels take another way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.one, self.two = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.one(x[:, :4]) + self.two(x[:, 4:])))


class Attention(nn.Module):
    """Products of matrices, which keep their channels, beside a network that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, 3, stride=2)
        self.query, self.key, self.value = (nn.Conv2d(8, 6, 1) for _ in range(3))
        self.after = conv(6, 10)
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        y = v @ (q.transpose(1, 2) @ k).softmax(-1)
        return self.head(self.after(y.view(len(y), -1, *x.shape[2:])))


class Computed(nn.Module):
    """Weight norm: the weights of one layer are made of other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 3, padding=1))
        self.last = conv(6, 8, 1)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.normed(self.stem(x))))


class Twins(nn.Module):
    """Two views of an image in one batch, and a signal along one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 10), conv(10, 6))
        self.along = nn.Conv1d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = self.stem(torch.cat([x, x.flip(-1)], 0))
        one, two = both.chunk(2, dim=0)
        return self.head(self.along((one + two).mean(-1)).mean(-1))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a model whose norms have statistics and no parameter is zero or one, without a trace outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                for tensor in (module.weight, module.running_var):
                    if tensor is not None:
                        tensor.data.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    if tensor is not None:
                        tensor.data.normal_(0, 0.3)
    return model


ZOO: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (lambda: ResNetCifar(1, 10, width=4), 8),
    "resnet20": (lambda: resnet20(width=4), 8),
    "vgg": (lambda: vgg16_bn_cifar(width=4), 32),
    "mobilenet": (lambda: mobilenet_v2_cifar(width=0.25), 16),
    **{
        kind.__name__.lower(): (kind, 8)
        for kind in (
            Dense, Inception, Chunks, Depthwise, Grouped, SqueezeExcite, Shared, Scales, PreActivation,
            Flatten, Shuffle, Growing, Gates, Tokens, Decoder, Padded, Own, Norms, Constants, Slices,
            Attention, Computed, Twins,
        )
    },
    "geometry": (Geometry, 16),
}  # fmt: skip
"""Name to what makes the model and the side of its images."""


@cache
def model(name: str) -> nn.Module:
    """Return a network of the zoo, in training mode."""
    return seeded(ZOO[name][0])


@cache
def source(name: str) -> Source:
    """Return it with its groups."""
    return Source(model(name), torch.zeros(1, 3, ZOO[name][1], ZOO[name][1]))


def images(name: str, batch: int = 2) -> Tensor:
    """Return random images for it."""
    side = ZOO[name][1]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(3))


def run(network: nn.Module, batch: Tensor) -> Tensor:
    """Run a network without gradients."""
    with torch.no_grad():
        return network(batch)


def macs_of(network: nn.Module, image: Tensor) -> int:
    """Count multiply-accumulates by PyTorch's own counter."""
    with FlopCounterMode(display=False) as counter:
        run(network, image)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def params_of(network: nn.Module) -> int:
    """Count the elements of all parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
