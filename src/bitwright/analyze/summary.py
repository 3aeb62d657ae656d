"""From the statistics of a pass to the sections of a report, block by block, so that only numbers are kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from bitwright.analyze.model import (
    ChannelMap,
    MassiveActivation,
    OutlierChannel,
    OutlierSection,
    ProfileRow,
    SiteRow,
    TopChannel,
    TransferRow,
    TransferSection,
)
from bitwright.analyze.outliers import RESIDUAL, BlockStatistics, Site
from bitwright.analyze.statistics import Magnitudes, SiteStatistics, position_bins

TOP_CHANNELS = 8
"""Channels listed for each site; also the least that two sets are compared by."""
MAP_CHANNELS = 40
INT8_TOKEN_SHARE, INT8_BLOCK_SHARE = 0.06, 0.25
"""LLM.int8's outlier channels (Dettmers et al., arXiv 2208.07339): at least 6 in size in so many tokens and blocks."""
MASSIVE_SIZE, MASSIVE_MEDIANS = 100.0, 1000.0
"""Massive activations (Sun et al., arXiv 2402.17762): beyond both, the second in medians of the block's input."""


class Summary:
    """Collects the statistics of blocks, in order, into sections.

    Attributes:
        tensors: mean square (diagonal of the mean Hessian) and absmax of each channel, float32, all tokens together, by
            `SET/BLOCK/SITE/mean_square` and `SET/BLOCK/SITE/absmax`.
    """

    def __init__(self, draws: Sequence[str], window_tokens: int):
        """`draws`: the name of each draw's set, in the order of the statistics."""
        self._members = {name: [i for i, other in enumerate(draws) if other == name] for name in dict.fromkeys(draws)}
        self._bins = position_bins(window_tokens)
        self.tensors: dict[str, Tensor] = {}
        self._sites: list[SiteRow] = []
        self._profiles: dict[str, list[Tensor]] = {name: [] for name in self._members}
        self._maps: dict[str, list[Tensor]] = {name: [] for name in self._members}
        self._massive: dict[tuple[str, int], MassiveActivation] = {}
        self._large: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self._members}
        self._transfer: dict[tuple[str, str], list[tuple[str, float, float, float | None]]] = {}

    def add(self, found: BlockStatistics) -> None:
        """Take in the statistics of one block."""
        hidden = found.sites[RESIDUAL][0].features
        inputs: dict[str, list[Magnitudes]] = {name: [] for name in self._members}
        for site, draws in found.sites.items():
            merged = {name: _merged([draws[i] for i in members]) for name, members in self._members.items()}
            for name, members in self._members.items():
                seeds = tuple(float(draws[i].rest.absmax.max()) for i in members)
                self._sites.append(_site_row(name, found.block, site, merged[name], seeds))
                whole = _whole(merged[name])
                self.tensors[f"{name}/{found.block}/{site.name}/mean_square"] = whole.rms.square()
                self.tensors[f"{name}/{found.block}/{site.name}/absmax"] = whole.absmax
                if site.kind == "linear_input" and whole.features == hidden:
                    inputs[name].append(whole)
                if site == RESIDUAL:
                    self._add_residual(name, found.block, merged[name])
            if site.kind == "linear_input":
                self._compare(f"block {found.block} {site.name}", merged)
        for name, several in inputs.items():
            if several:
                shares = torch.stack([one.large / max(one.tokens, 1) for one in several]).amax(0)
                self._large[name].append((shares, torch.stack([one.absmax for one in several]).amax(0)))

    def outliers(self) -> OutlierSection:
        """What was seen at the sites."""
        return OutlierSection(
            sites=tuple(self._sites),
            profiles=tuple(row for name in self._members for row in self._profile_rows(name)),
            channel_maps=self._channel_maps(),
            int8_channels=tuple(row for name, large in self._large.items() for row in _int8_channels(name, large)),
            massive=tuple(self._massive.values()),
        )

    def transfer(self) -> TransferSection | None:
        """What static settings of one set do on another; None of a single set."""
        if len(self._members) < 2:
            return None
        return TransferSection(rows=tuple(_transfer_row(*pair, found) for pair, found in self._transfer.items()))

    def _add_residual(self, name: str, block: int, statistics: SiteStatistics) -> None:
        self._profiles[name].append(statistics.profile)
        rest = statistics.rest
        typical = rest.rms.median().clamp_min(torch.finfo(torch.float32).tiny)
        self._maps[name].append((rest.rms / typical).clamp_min(1e-6).log2())
        first, median = statistics.first, rest.quantile(0.5)
        largest = rest.absmax if first is None else torch.maximum(first.absmax, rest.absmax)
        massive = (largest > MASSIVE_SIZE) & (largest > MASSIVE_MEDIANS * median)
        for channel in massive.nonzero().flatten().tolist():
            at_first = first is not None and float(first.absmax[channel]) > float(rest.absmax[channel])
            row = MassiveActivation(
                set=name,
                block=block,
                channel=channel,
                absmax=float(largest[channel]),
                median=median,
                first_position=at_first,
            )
            self._massive.setdefault((name, channel), row)

    def _compare(self, where: str, merged: dict[str, SiteStatistics]) -> None:
        channels = {name: _whole(one).rms for name, one in merged.items()}
        for one, other in product(merged, merged):
            clipped = merged[other].share_beyond(merged[one].absmax)
            alike = _jaccard(_largest(channels[one]), _largest(channels[other]))
            ranks = _rank_correlation(channels[one], channels[other])
            self._transfer.setdefault((one, other), []).append((where, clipped, alike, ranks))

    def _channel_maps(self) -> tuple[ChannelMap, ...]:
        """The channels that stand out most in any block and set, in their own order; the same for all sets."""
        tables = {name: torch.stack(rows) for name, rows in self._maps.items()}
        strength = torch.cat(list(tables.values())).amax(0)
        chosen = strength.topk(min(MAP_CHANNELS, len(strength))).indices.sort().values
        return tuple(
            ChannelMap(
                set=name,
                site="residual",
                channels=tuple(chosen.tolist()),
                rows=tuple(tuple(round(value, 3) for value in row) for row in table[:, chosen].tolist()),
            )
            for name, table in tables.items()
        )

    def _profile_rows(self, name: str) -> list[ProfileRow]:
        return [
            ProfileRow(
                set=name,
                start=start,
                stop=stop,
                absmax=tuple(float(profile[index]) for profile in self._profiles[name]),
            )
            for index, (start, stop) in enumerate(self._bins)
        ]


def _merged(several: Sequence[SiteStatistics]) -> SiteStatistics:
    whole = SiteStatistics(several[0].features, several[0].name)
    for one in several:
        whole.merge(one)
    return whole


def _whole(statistics: SiteStatistics) -> Magnitudes:
    """All positions together."""
    whole = Magnitudes(statistics.features)
    for part in (statistics.first, statistics.rest):
        if part is not None:
            whole.merge(part)
    return whole


def _site_row(name: str, block: int, site: Site, statistics: SiteStatistics, seeds: tuple[float, ...]) -> SiteRow:
    return SiteRow(
        set=name,
        block=block,
        kind=site.kind,
        site=site.name,
        channels=statistics.features,
        first=None if statistics.first is None else statistics.first.spread(),
        rest=statistics.rest.spread(),
        absmax_by_seed=seeds,
        top=_top_channels(statistics.rest),
    )


def _top_channels(rest: Magnitudes) -> tuple[TopChannel, ...]:
    """The most persistent channels, of equally persistent ones the larger first."""
    rms, typical = rest.rms, float(rest.rms.median())
    order = sorted(range(rest.features), key=lambda c: (-int(rest.top[c]), -float(rest.squares[c]), c))
    return tuple(
        TopChannel(
            channel=channel,
            persistence=float(rest.persistence[channel]),
            absmax=float(rest.absmax[channel]),
            rms=float(rms[channel]),
            rms_ratio=float(rms[channel]) / typical if typical > 0 else None,
        )
        for channel in order[: min(TOP_CHANNELS, rest.features)]
    )


def _int8_channels(name: str, blocks: Sequence[tuple[Tensor, Tensor]]) -> list[OutlierChannel]:
    if not blocks:
        return []
    shares, largest = (torch.stack(several) for several in zip(*blocks, strict=True))
    kept = (shares >= INT8_TOKEN_SHARE).float().mean(0)
    return [
        OutlierChannel(
            set=name,
            channel=channel,
            block_share=float(kept[channel]),
            token_share=float(shares[:, channel].max()),
            absmax=float(largest[:, channel].max()),
        )
        for channel in (kept >= INT8_BLOCK_SHARE).nonzero().flatten().tolist()
    ]


def _transfer_row(one: str, other: str, found: Sequence[tuple[str, float, float, float | None]]) -> TransferRow:
    worst = max(found, key=lambda row: row[1])
    ranks = [row[3] for row in found if row[3] is not None]
    return TransferRow(
        calibration=one,
        evaluation=other,
        clip_rate=sum(row[1] for row in found) / len(found),
        worst_clip_rate=worst[1],
        worst_site=worst[0],
        outlier_jaccard=sum(row[2] for row in found) / len(found),
        hessian_rank_correlation=sum(ranks) / len(ranks) if ranks else None,
    )


def _largest(rms: Tensor) -> set[int]:
    """The largest channels: 1 % of them, `TOP_CHANNELS` at least."""
    count = min(len(rms), max(TOP_CHANNELS, len(rms) // 100))
    return set(rms.topk(count).indices.tolist())


def _jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)


def _rank_correlation(one: Tensor, other: Tensor) -> float | None:
    """Spearman's correlation; None where a vector is constant. Ties, rare among sums of squares, keep their order."""
    if float(one.min()) == float(one.max()) or float(other.min()) == float(other.max()):
        return None
    ranks = torch.stack([one.argsort(stable=True).argsort(), other.argsort(stable=True).argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1].clamp(-1, 1))
