"""What ``yolofleet bench`` measured, for people: the JSON of a command → Markdown, and a picture.

limit | serve | batch | peers ─ as_dict() ─→ JSON ─┬─→ markdown()  a table, and under which circumstances it holds
                                                   └─→ plot()      PNG
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from deploy.bench import BenchError

Report = dict[str, Any]

LIMIT = "limit of this machine"
MOST_OFF = 0.05  # of the boxes; other preprocessing than Ultralytics' costs 1 or 2 in 100


def markdown(report: Report) -> str:
    """The report as a Markdown table, with its circumstances.

    Raises:
        BenchError: it is no report of ours.
    """
    return "\n".join([*_known(report, _TABLES)(report), "", *_circumstances(report["circumstances"])])


def plot(report: Report, path: Path) -> None:
    """Draw the report as PNG.

    Raises:
        BenchError: it is no report of ours.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    _known(report, _PLOTS)(report, axes)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _known(report: Report, by_kind: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    kind = report.get("kind")
    if kind not in by_kind:
        raise BenchError(
            f"Its kind is {kind!r}: give the JSON that 'yolofleet bench {'|'.join(by_kind)} --json FILE' has written"
        )
    return by_kind[kind]


def _limit_table(report: Report) -> Iterator[str]:
    stages = [*report["limits"][0]["stage_ms"]]
    yield from _header("streams", "images/s", *(f"{stage}, ms" for stage in stages), "CPU, ms")
    for limit in report["limits"]:
        times = [f"{limit['stage_ms'][stage]:.2f}" for stage in stages]
        yield _row(limit["streams"], f"{limit['images_per_s']:.2f}", *times, f"{limit['cpu_ms']:.1f}")


def _limit_plot(report: Report, axes: Any) -> None:
    streams = [str(limit["streams"]) for limit in report["limits"]]
    below = [0.0] * len(streams)
    for stage in report["limits"][0]["stage_ms"]:
        heights = [limit["stage_ms"][stage] for limit in report["limits"]]
        axes.bar(streams, heights, bottom=below, label=stage)
        below = [bottom + height for bottom, height in zip(below, heights, strict=True)]
    axes.set(xlabel="streams", ylabel="ms an image, in each stream", title="The limit of this machine")
    axes.legend()


def _serve_table(report: Report) -> Iterator[str]:
    yield from _header("load", "answered/s", "p50, ms", "p95, ms", "p99, ms", "CPU a request, ms", "errors")
    for (loop, offered), levels in _grouped(report["levels"]).items():
        name = f"{offered:g} callers" if loop == "closed" else f"{offered:.1f}/s offered"
        cpu = [sum(level["cpu_ms"].values()) for level in levels if level["cpu_ms"]]
        times = [_mid(levels, key) for key in ("p50_ms", "p95_ms", "p99_ms")]
        errors = sum(sum(level["errors"].values()) for level in levels)
        yield _row(name, _mid(levels, "per_s", 2), *times, f"{median(cpu):.1f}" if cpu else "", errors)
    yield ""
    yield from _serve_facts(report)


def _serve_facts(report: Report) -> Iterator[str]:
    """What is not of one load, in sentences."""
    if report["engine"]:
        yield f"- The engine is {report['engine']}."
    if report["limit"]:
        most = max(_middle(levels, "per_s") for (loop, _), levels in _grouped(report["levels"]).items() if loop == "closed")
        limit = report["limit"]["images_per_s"]
        each = " before and ".join(f"{per_s:.2f}" for per_s in report.get("limit_per_s") or [])
        known = f" ({each} after the endpoint)" if each else ""  # unless an earlier version has written it
        yield f"- The {LIMIT} is {limit:.2f} images/s{known}; the endpoint has {most / limit:.2f} of it at its best."
    if report["in_a_loop_ms"]:
        yield f"- `YOLO.predict` on the same engine in a loop takes {report['in_a_loop_ms']:.1f} ms an image (median)."
    if report["cpu_ms_beside_engine"] is not None:
        beside = report["cpu_ms_beside_engine"]
        yield f"- CPU per request beside decoding, letterbox, engine and post-processing, 16 callers: {beside:.1f} ms."
    by_role = [level["cpu_ms"] for level in report["levels"] if level["cpu_ms"] and level["offered"] == 16]
    if by_role:
        roles = {role: median(each.get(role, 0.0) for each in by_role) for role in by_role[0]}
        yield f"- CPU a request by process, 16 callers: {_listed(roles, 'ms')}."
    if report["idle_cores"] is not None:
        idle = {role: 100 * cores for role, cores in report["idle_cores"].items()}
        yield f"- Idle: {sum(idle.values()):.1f} % of a core ({_listed(idle, '%')})."
    if report["memory_mb"]:
        replicas = ", ".join(f"{mb:.0f}" for mb in report["memory_mb"]["replicas"])
        yield f"- Memory: {replicas} MB a replica, {report['memory_mb']['all'][0]:.0f} MB all processes together."
    if report["start_s"] is not None:
        yield f"- First answer {report['start_s']:.1f} s after the start; {report['restart_s']:.1f} s after a replica's death."
    generator = median(level["generator_cpu_ms"] for level in report["levels"])
    yield f"- The load generator itself takes {generator:.2f} ms of CPU a request."


def _serve_plot(report: Report, axes: Any) -> None:
    for loop, marker in (("closed", "o-"), ("open", "s--")):
        groups = [levels for (its_loop, _), levels in _grouped(report["levels"]).items() if its_loop == loop]
        for key in ("p50_ms", "p99_ms"):
            points = [(_middle(levels, "per_s"), _middle(levels, key)) for levels in groups if levels[0][key] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker, label=f"{loop} loop, {key[:3]}")
    if report["limit"]:
        axes.axvline(report["limit"]["images_per_s"], color="grey", linestyle=":", label=LIMIT)
    axes.set(xlabel="requests answered, per second", ylabel="ms from when a request was due", yscale="log")
    axes.set_title("The endpoint under load")
    axes.legend()


_BATCH_SIDES = {
    "limit": LIMIT,
    "job": "dataset job",
    "predict": "YOLO.predict(folder, stream=True)",
    "openvino": "the same on OpenVINO",
}


def _batch_table(report: Report) -> Iterator[str]:
    yield from _header("", "images/s", "the job is")
    for side, title in _BATCH_SIDES.items():
        if side in report["per_s"]:
            times = f"{report['job_is'][side]:.2f} times it" if side in report["job_is"] else ""
            yield _row(title, f"{median(report['per_s'][side]):.2f}", times)
    yield ""
    yield f"- ms an image in one stream of the limit: {_listed(report['stage_ms'], 'ms', 2)}."
    yield f"- The job's model threads waited {report['job_stage_ms']['starved']:.2f} ms an image for work."
    yield f"- Medians of {len(report['per_s']['job'])} rounds of {report['images']} images."
    yield f"- Loading took {report['loading_s']:.1f} s, which are not in the rate."


def _batch_plot(report: Report, axes: Any) -> None:
    sides = {title: report["per_s"][side] for side, title in _BATCH_SIDES.items() if side in report["per_s"]}
    _bars(axes, sides, "images per second")
    axes.set_title("A dataset job")


def _peers_table(report: Report) -> Iterator[str]:
    """A line for each side, the fastest of its setup first; peers are compared with yolofleet's best in that setup."""
    yield from _header("", "images/s", "p50, ms", "p95, ms", "CPU an image, ms", "memory, MB", "boxes off", "yolofleet is")
    for setup, title in (("documented", "as documented"), ("same engine", "on one OpenVINO export")):
        yield _row(f"**{title}**", *[""] * 7)
        for side in _ranked(report, setup):
            yield _peer_row(report, side)
    yield ""
    missing = {(side["title"], side["reason"]) for side in report["sides"] if side["reason"]}
    yield from (f"- {title} was not measured: {reason}" for title, reason in sorted(missing))
    versions = {f"{side['title']} {side['version']}" for side in report["sides"] if side["version"]}
    yield f"- {', '.join(sorted(versions))}."
    counts = f"{report['requests']} requests of {report['callers']} callers, {report['images']} images"
    yield f"- Medians of {report['rounds']} rounds; {counts}. 'Boxes off' is against `YOLO.predict` on the same file;"
    yield f"  beyond {MOST_OFF:.0%} a side has no place. The limit stands beside yolofleet's first side, for that one."


def _peer_row(report: Report, side: Report) -> str:
    levels = side["levels"]
    cpu = f"{median(sum(level['cpu_ms'].values()) for level in levels):.0f}" if levels else ""
    memory = f"{median(side['memory_mb']):.0f}" if side["memory_mb"] else ""
    off = "" if side["boxes_off"] is None else f"{100 * side['boxes_off']:.1f} %"
    errors = sum(sum(level["errors"].values()) for level in levels)
    name = side["title"] + (f", {side['engine']}" if side["engine"] else "") + (f", {errors} errors" if errors else "")
    name += ", **wrong boxes**" if _is_wrong(side) else ""
    times = [_mid(levels, "p50_ms"), _mid(levels, "p95_ms")] if levels else ["", ""]
    return _row(name, f"{median(side['per_s']):.2f}", *times, cpu, memory, off, _times_faster(report, side))


def _times_faster(report: Report, side: Report) -> str:
    """How much faster yolofleet is: the median of the ratios within each round.

    That is its fastest fleet, but for the limit, which is measured beside the first one.
    """
    ranked = [each for each in _ranked(report, side["setup"]) if not _is_wrong(each)]
    fleets = [each for each in ranked if each["title"].startswith("yolofleet")]
    if side["title"] == LIMIT:
        among = (each for each in report["sides"] if each["setup"] == side["setup"])
        first = next(each for each in among if each["title"].startswith("yolofleet"))
        fleets = [each for each in fleets if each is first]
    if not fleets or _is_wrong(side) or side["title"].startswith("yolofleet"):
        return ""
    pairs = zip(fleets[0]["per_s"], side["per_s"], strict=False)
    return f"{median(ours / theirs for ours, theirs in pairs):.2f} times it"


def _ranked(report: Report, setup: str) -> list[Report]:
    """Who was measured, the fastest first; then, without a place, who answered wrongly."""
    sides = [side for side in report["sides"] if side["setup"] == setup and side["per_s"] and not side["reason"]]
    return sorted(sides, key=lambda side: (_is_wrong(side), -median(side["per_s"])))


def _is_wrong(side: Report) -> bool:
    return (side["boxes_off"] or 0.0) > MOST_OFF


def _peers_plot(report: Report, axes: Any) -> None:
    names = {"documented": "as documented", "same engine": "OpenVINO"}
    sides = [side for setup in names for side in _ranked(report, setup) if not _is_wrong(side)]
    _bars(axes, {f"{side['title']} ({names[side['setup']]})": side["per_s"] for side in sides}, "images per second")
    axes.set_title(f"{report['callers']} callers, the same weights and images")


def _bars(axes: Any, values: dict[str, Sequence[float]], label: str) -> None:
    """A horizontal bar for each median, with the span of its rounds, the first one on top."""
    names, middles = [*values], [median(each) for each in values.values()]
    spans = [[middle - min(each) for middle, each in zip(middles, values.values(), strict=True)]]
    spans.append([max(each) - middle for middle, each in zip(middles, values.values(), strict=True)])
    bars = axes.barh(names, middles, xerr=spans, capsize=3)
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.invert_yaxis()
    axes.set_xlabel(label)


def _circumstances(seen: dict[str, Any]) -> Iterator[str]:
    versions = [f"{name} {number}" for name, number in ({"Python": seen["python"]} | seen["versions"]).items() if number]
    yield f"- {seen['cpu']}, {seen['cores']} cores, {seen['memory_gb']:g} GB; {seen['system']}."
    yield f"- {', '.join(versions)}."
    yield f"- `{seen['command']}` at commit {seen['commit']}."


def _grouped(levels: Sequence[Report]) -> dict[tuple[str, float], list[Report]]:
    """The rounds of each load together."""
    groups: dict[tuple[str, float], list[Report]] = {}
    for level in levels:
        groups.setdefault((level["loop"], level["offered"]), []).append(level)
    return groups


def _middle(levels: Sequence[Report], key: str) -> float:
    return float(median(level[key] for level in levels if level[key] is not None))


def _mid(levels: Sequence[Report], key: str, digits: int = 0) -> str:
    return f"{_middle(levels, key):.{digits}f}" if any(level[key] is not None for level in levels) else ""


def _listed(values: dict[str, float], unit: str, digits: int = 1) -> str:
    return ", ".join(f"{name} {value:.{digits}f} {unit}" for name, value in values.items())


def _header(*cells: object) -> Iterator[str]:
    yield _row(*cells)
    yield "|---" + "|--:" * (len(cells) - 1) + "|"


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


_TABLES = {"limit": _limit_table, "serve": _serve_table, "batch": _batch_table, "peers": _peers_table}
_PLOTS = {"limit": _limit_plot, "serve": _serve_plot, "batch": _batch_plot, "peers": _peers_plot}
