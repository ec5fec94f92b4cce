"""The shapes of real models' parameters: what the benchmark clips.

Lists of shapes, so that no model has to be built or downloaded. `scale` multiplies the
widths by its square root, and with them the number of parameters by about itself.
"""

import math

Shape = tuple[int, ...]


def gpt2(scale: float = 1.0, layers: int = 12, width: int = 768) -> dict[str, Shape]:
    """GPT-2 (Radford 2019): 124M parameters in 148 leaves at the defaults."""
    width = _scaled(width, scale)
    shapes: dict[str, Shape] = {
        "token/embedding": (_scaled(50257, scale, 1), width),
        "position/embedding": (1024, width),
        "norm/scale": (width,),
        "norm/bias": (width,),
    }
    for number in range(layers):
        block = {
            "norm_1/scale": (width,),
            "norm_1/bias": (width,),
            "qkv/kernel": (width, 3 * width),
            "qkv/bias": (3 * width,),
            "projection/kernel": (width, width),
            "projection/bias": (width,),
            "norm_2/scale": (width,),
            "norm_2/bias": (width,),
            "up/kernel": (width, 4 * width),
            "up/bias": (4 * width,),
            "down/kernel": (4 * width, width),
            "down/bias": (width,),
        }
        shapes |= {f"block_{number}/{name}": shape for name, shape in block.items()}
    return shapes


def gpt2_xl(scale: float = 1.0) -> dict[str, Shape]:
    """GPT-2 XL: 1.5B parameters, for a large GPU."""
    return gpt2(scale, layers=48, width=1600)


def resnet50(scale: float = 1.0) -> dict[str, Shape]:
    """ResNet-50 (He 2015): 25.6M parameters, most of them in convolutions."""
    root = _scaled(64, scale, 8)
    shapes: dict[str, Shape] = {"stem/kernel": (7, 7, 3, root)}
    shapes |= _norm("stem", root)
    inputs = root
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = root * 2**stage
        for block in range(blocks):
            name = f"stage_{stage}/block_{block}"
            convolutions = {
                "conv_1": (1, 1, inputs, width),
                "conv_2": (3, 3, width, width),
                "conv_3": (1, 1, width, 4 * width),
            }
            if block == 0:
                convolutions["shortcut"] = (1, 1, inputs, 4 * width)
            for conv, shape in convolutions.items():
                shapes[f"{name}/{conv}/kernel"] = shape
                shapes |= _norm(f"{name}/{conv}", shape[-1])
            inputs = 4 * width
    return shapes | {"head/kernel": (inputs, 1000), "head/bias": (1000,)}


def moe(scale: float = 1.0) -> dict[str, Shape]:
    """Two layers of a mixture of 12 experts, stacked: few leaves, and large ones."""
    width = _scaled(768, scale)
    shapes: dict[str, Shape] = {}
    for number in range(2):
        shapes |= {
            f"layer_{number}/router/kernel": (width, 12),
            f"layer_{number}/experts/up": (12, width, 2 * width),
            f"layer_{number}/experts/gate": (12, width, 2 * width),
            f"layer_{number}/experts/down": (12, 2 * width, width),
            f"layer_{number}/attention/kernel": (width, 4 * width),
            f"layer_{number}/norm/scale": (width,),
        }
    return shapes


def small(scale: float = 1.0) -> dict[str, Shape]:
    """1000 leaves of at most 4096 numbers: what starting each of them costs."""
    width = _scaled(64, scale, 4)
    cycle = ((width, width), (width,), (width, width // 2), (width // 2,))
    return {f"leaf_{number}": cycle[number % 4] for number in range(1000)}


def equal(scale: float = 1.0) -> dict[str, Shape]:
    """400 equal leaves: what a group for each of them costs to compile."""
    width = _scaled(64, scale, 4)
    return {f"leaf_{number}": (width, width) for number in range(400)}


def large(scale: float = 1.0) -> dict[str, Shape]:
    """One leaf of 64M numbers: nothing but bytes."""
    width = _scaled(8192, scale)
    return {"kernel": (width, width)}


def perceptron(scale: float = 1.0) -> dict[str, Shape]:
    """An embedding and a layer: few leaves to compile, for a quick look."""
    width = _scaled(768, scale)
    return {
        "token/embedding": (_scaled(50257, scale, 1), width),
        "up/kernel": (width, 4 * width),
        "up/bias": (4 * width,),
    }


def matrix(scale: float = 1.0) -> dict[str, Shape]:
    """One matrix, for what sorts or factorises it."""
    width = _scaled(1024, scale)
    return {"kernel": (width, width)}


def attention(scale: float = 1.0) -> dict[str, Shape]:
    """Queries and keys of one layer with heads of 64 features."""
    width = _scaled(1024, scale)
    kernel = (width, width // 64, 64)
    return {f"attention/{name}/kernel": kernel for name in ("query", "key")}


SETS = {
    "gpt2": gpt2,
    "gpt2-xl": gpt2_xl,
    "resnet50": resnet50,
    "moe": moe,
    "small": small,
    "equal": equal,
    "large": large,
    "perceptron": perceptron,
    "matrix": matrix,
    "attention": attention,
}


def _scaled(width: int, scale: float, step: int = 64) -> int:
    if scale == 1.0:
        return width
    return max(step, round(width * math.sqrt(scale) / step) * step)


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}/scale": (width,), f"{name}/shift": (width,)}
