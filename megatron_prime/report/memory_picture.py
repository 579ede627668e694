"""Memory over the phases of a step, as one picture.

A stack per phase: an owner is a hue, what it holds a shade of it, from what stays (dark, at the
bottom) to what comes and goes with the work (light, hatched). The line is the device's memory, the
band under it the reserve. Hues are those of Okabe and Ito, which people with any colour vision can
tell apart; shades of one hue differ in lightness, and large parts carry their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

GIB = 2**30
HUES = {
    "engine": "#E69F00",
    "sync": "#8A8A8A",
    "policy": "#0072B2",
    "prm": "#009E73",
    "reference": "#CC79A7",
    "critic": "#D55E00",
}
OWNERS = {"engine": "rollout engine", "sync": "weight sync", "prm": "PRM"}
KINDS = {  # how much of its hue each kind keeps; the rest is white
    "weights": 1.0,
    "buffers": 0.8,
    "fp8_copies": 0.9,
    "masters": 0.8,
    "moments": 0.62,
    "gradients": 0.46,
    "kv_cache": 0.62,
    "cuda_graphs": 0.8,
}
WORK = 0.22
NAMES = {
    "fp8_copies": "FP8 copies",
    "masters": "fp32 masters",
    "moments": "Adam moments",
    "kv_cache": "KV cache",
    "cuda_graphs": "CUDA graphs",
    "step": "optimizer step",
}
_LABELLED = 0.032  # of the axis: parts that are high enough for their name
_LINE = "#B00020"


@dataclass(frozen=True, slots=True)
class PhaseBar:
    """A phase on the rank that needs most."""

    phase: str
    parts: Mapping[str, int]  # bytes by owner.kind
    work: tuple[str, int]  # what comes and goes: owner.kind and bytes
    caption: str = ""  # under the phase's name


def draw_memory(
    bars: Sequence[PhaseBar],
    device_bytes: int,
    reserve_bytes: int,
    png: Path,
    title: str,
    subtitle: str = "",
) -> None:
    """Draw `bars` into `png`."""
    figure: Any = Figure(figsize=(2.2 + 1.7 * len(bars), 7.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=27)
    above = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(subtitle, (0, 1), (0, 10), fontsize=10, color="#444444", **above)
    highest = max([device_bytes, *(sum(bar.parts.values()) + bar.work[1] for bar in bars)])
    top = 1.06 * highest / GIB
    axes.set_ylim(0, top)
    shown: dict[str, None] = {}
    for place, bar in enumerate(bars):
        _stack(axes, place, bar, top, shown)
    _limit(axes, device_bytes, reserve_bytes)
    axes.set_xlim(-0.5, len(bars) + 0.1)  # room for the limit's label
    names = [bar.phase.replace("_", " ").replace("prm", "PRM") for bar in bars]
    labels = [f"{name}\n{bar.caption}".rstrip() for name, bar in zip(names, bars, strict=True)]
    axes.set_xticks(range(len(bars)), labels, fontsize=9)
    axes.set_ylabel("GiB on the rank that needs most", fontsize=9)
    axes.tick_params(axis="y", labelsize=8.5, length=3)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, _in_order(shown))
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)


def color_of(name: str) -> tuple[float, float, float]:
    """Of owner.kind: the owner's hue, mixed with white."""
    owner, kind = name.split(".")
    share = KINDS.get(kind, WORK)
    red, green, blue = (1 - share * (1 - value) for value in to_rgb(HUES[owner]))
    return red, green, blue


def label_of(name: str) -> str:
    """What is held, for people."""
    kind = name.split(".")[1]
    return NAMES.get(kind, kind.replace("_", " "))


def _in_order(names: Mapping[str, None] | Mapping[str, int]) -> list[str]:
    """By owner, what stays before what works."""
    owners, kinds = list(HUES), list(KINDS)

    def place(name: str) -> tuple[int, int]:
        owner, kind = name.split(".")
        return owners.index(owner), kinds.index(kind) if kind in kinds else len(kinds)

    return sorted(names, key=place)


def _stack(axes: Any, place: int, bar: PhaseBar, top: float, shown: dict[str, None]) -> None:
    bottom = 0.0
    parts = [(name, bar.parts[name]) for name in _in_order(bar.parts) if bar.parts[name]]
    for name, nbytes in [*parts, *([bar.work] if bar.work[1] else [])]:
        height, color = nbytes / GIB, color_of(name)
        hatch = "////" if name == bar.work[0] else None
        edge = {"edgecolor": "white", "linewidth": 0.8}
        axes.bar(place, height, 0.84, bottom=bottom, color=color, hatch=hatch, **edge)
        if height > _LABELLED * top:
            dark = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] < 0.55
            box = {"facecolor": color, "edgecolor": "none", "pad": 1.5}  # no line runs through it
            style = {"ha": "center", "va": "center", "fontsize": 8, "bbox": box, "zorder": 6}
            text = f"{label_of(name)}  {height:.1f}"
            ink = "white" if dark else "#222222"
            axes.text(place, bottom + height / 2, text, color=ink, **style)
        bottom += height
        shown[name] = None
    total = {"ha": "center", "va": "bottom", "fontsize": 9.5, "fontweight": "bold"}
    axes.text(place, bottom + 0.006 * top, f"{bottom:.1f}", zorder=5, **total)


def _limit(axes: Any, device_bytes: int, reserve_bytes: int) -> None:
    device, usable = device_bytes / GIB, (device_bytes - reserve_bytes) / GIB
    axes.axhline(device, color=_LINE, linewidth=1.4, zorder=4)
    if reserve_bytes:
        axes.axhspan(usable, device, color=_LINE, alpha=0.09, linewidth=0, zorder=0.5)
    words = f"device\n{device:g} GiB" + f"\n({device - usable:g} reserve)" * bool(reserve_bytes)
    style = {"color": _LINE, "fontsize": 8, "ha": "right", "va": "top"}
    at = {"textcoords": "offset points", "xycoords": ("axes fraction", "data")}
    axes.annotate(words, (1, usable), (-2, -4), **at, **style)


def _legend(figure: Any, names: Sequence[str]) -> None:
    """From top to bottom as the stacks are, an owner's name above what it holds."""
    handles: list[Patch] = []
    heads: list[int] = []
    owner = ""
    for name in reversed(names):
        if (next_owner := name.split(".")[0]) != owner:
            owner = next_owner
            heads.append(len(handles))
            handles.append(Patch(alpha=0, label=OWNERS.get(owner, owner)))
        hatch = None if name.split(".")[1] in KINDS else "////"
        color = color_of(name)
        patch = Patch(facecolor=color, edgecolor="white", hatch=hatch, label=label_of(name))
        handles.append(patch)
    legend = figure.legend(
        handles=handles,
        loc="outside right upper",
        frameon=False,
        fontsize=8.5,
        handlelength=1.5,
        handleheight=1.1,
        borderpad=3,
    )
    for head in heads:
        legend.get_texts()[head].set(fontweight="bold", x=-24)
