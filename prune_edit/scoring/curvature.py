"""`log E_p[exp(m b)]` for many neurons and distributions at once, past its first order.

With the final norm frozen, the importance of a neuron (arXiv 2409.14144, section 4.1) is
`m b_w - log E_p[exp(m b)]`: b (V,) is its value vector through norm and unembedding, m its
coefficient, p the distribution it is added to. The first order, `m (b_w - E_p[b])`, takes two dot
products of D numbers. What is left is the curvature

    C = log E_p[exp(Y)],  Y = m (b - E_p[b]);  C >= 0 by Jensen's inequality.

b does not depend on the prompt, so each block of it is computed once, and the moments of b under
all A distributions are matrix products (n, V) x (V, A), one a degree. |Y| is small for most pairs
of a neuron and a distribution, and a Taylor polynomial of a few degrees is exact to float32: with
r = max |b - c| and c a constant near the means, degree K leaves at most

    |m|^(K+1) E_p|b - c|^(K+1) exp(|m| r) / (K+1)!,   E_p|b - c|^(K+1) <= E_p[(b - c)^K] r  (K even)

of the expectation, by Lagrange. The bound is checked for each pair with the r and moments found;
pairs that no degree up to `MAX_DEGREE` brings under `TOLERANCE` are summed directly.

Operations: 2 n V (D + A (K-1)), plus V exponentials for a pair summed directly. Memory: five
blocks of at most `block` numbers, and (n, A) arrays for at most `_ROWS` rows at a time.
"""

from __future__ import annotations

import math

import torch

TOLERANCE = 5e-7
"""What truncation and cancellation may cost a curvature, in nats."""
MAX_DEGREE = 14

_ROWS = 1024  # neurons at a time
_SAMPLE = 384  # tokens from which the degrees are guessed
_ROUNDING = 2.0**-21  # relative, of moments summed in float32


def block_size(device: torch.device) -> int:
    """Numbers in a block of neurons by tokens: what caches hold, or what fills an accelerator."""
    return 1 << 19 if device.type == "cpu" else 1 << 25


def curvature(
    values: torch.Tensor,
    unembedding: torch.Tensor,
    log_p: torch.Tensor,
    expected: torch.Tensor,
    moved: torch.Tensor,
    block: int | None = None,
) -> torch.Tensor:
    """The curvature C of every pair, (A, n) float32 in nats.

    `values` (n, D) float32 have passed the norm's linear part; `unembedding` is (V, D), `log_p`
    (A, V), `expected` (A, D) the mean of the unembedding's rows under each p, `moved` (A, n) m.
    """
    block = block or block_size(values.device)
    found = torch.empty_like(moved)
    centre = expected.mean(0)
    offset = (expected - centre).T  # (D, A)
    for rows in torch.arange(len(values), device=values.device).split(_ROWS):
        sizes = moved[:, rows].T.abs().double()  # (n, A)
        first = moved[:, rows].T.double() * (values[rows] @ offset)
        needed = _needed(sizes, *_guess(values[rows], unembedding, centre), first)
        done = torch.zeros_like(first, dtype=torch.bool)
        part = torch.zeros_like(first)
        for _ in range(2):
            fits = (needed <= MAX_DEGREE) & ~done
            degrees = torch.where(fits, needed, 0).amax(1)
            some = degrees.argsort(descending=True, stable=True)
            some = some[: int((degrees > 0).sum())]
            if not len(some):
                break
            tile = _Tile(values[rows[some]], unembedding, log_p, centre, degrees[some], block)
            got, error = tile.curvature(moved[:, rows[some]].T.double(), first[some])
            good = fits[some] & (error <= TOLERANCE)
            part[some] = torch.where(good, got, part[some])
            done[some] |= good
            again = _needed(sizes[some], tile.reach, tile.bounds(), first[some])
            # A degree that did not do is not tried again.
            again[again <= degrees[some, None]] = MAX_DEGREE + 1
            needed[some] = again
        rest = (~done).nonzero()
        if len(rest):
            pairs = rows[rest[:, 0]], rest[:, 1]
            total = expectations(values, unembedding, log_p, moved, pairs, centre, None, block)
            part[~done] = total.double() - first[~done]
        found[:, rows] = part.clamp_(min=0.0).T.float()
    return found


def _guess(
    values: torch.Tensor, unembedding: torch.Tensor, centre: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """From some tokens: r (n, 1), and a bound of E|b - c|^(K+1) for K = 2, 3, ... (n, 1) each."""
    step = max(1, len(unembedding) // _SAMPLE)
    square = (values @ (unembedding[::step].float() - centre).T).square_()  # (n, S)
    largest = square.amax(1, keepdim=True).clamp_(min=1e-30)
    square /= largest
    reach = largest.double().sqrt() * (1.0 if step == 1 else 1.6)
    power, moments = torch.ones_like(square), []
    for degree in range(2, MAX_DEGREE + 1):
        if degree % 2 == 0:
            power *= square
            even = power.mean(1, keepdim=True).double() * 2.0
        moments.append(even * largest.double() ** (degree // 2) * reach ** (1 + degree % 2))
    return reach, moments


def _needed(
    sizes: torch.Tensor, reach: torch.Tensor, moments: list[torch.Tensor], first: torch.Tensor
) -> torch.Tensor:
    """The smallest degree whose remainder fits, (n, A); MAX_DEGREE + 1 where none does.

    `sizes` (n, A) |m|; `moments` bound E|b - c|^(K+1). E exp >= exp E bounds the divisor.
    """
    needed = torch.full_like(sizes, MAX_DEGREE + 1, dtype=torch.long)
    left = (sizes * reach - first).exp() * sizes.square() * (0.55 / TOLERANCE)
    for degree in range(2, MAX_DEGREE + 1):
        left *= sizes / (degree + 1)
        fits = left * moments[degree - 2] <= 1.0
        needed[fits & (needed > MAX_DEGREE)] = degree
        if bool(fits.all()):
            break
    return needed


class _Tile:
    """The moments of some neurons under all p, rows in order of falling degree."""

    def __init__(
        self,
        values: torch.Tensor,
        unembedding: torch.Tensor,
        log_p: torch.Tensor,
        centre: torch.Tensor,
        degrees: torch.Tensor,
        block: int,
    ) -> None:
        rows, tokens = len(values), len(unembedding)
        self.degrees = degrees
        self.counts = [int((degrees >= k).sum()) for k in range(int(degrees[0]) + 1)]
        self.moments = [  # from the second on: (rows of at least that degree, A)
            torch.zeros(count, len(log_p), device=values.device) for count in self.counts[2:]
        ]
        square = torch.zeros(rows, device=values.device)
        width = min(tokens, max(16, block // max(rows, *values.shape[1:], len(log_p))))
        held, power = torch.empty(2, rows * width, device=values.device)
        for start in range(0, tokens, width):
            part = slice(start, start + width)
            weight = unembedding[part].float() - centre
            p = log_p[:, part].exp().T
            shape = rows, len(weight)
            b = torch.mm(values, weight.T, out=held[: math.prod(shape)].view(shape))
            y = torch.mul(b, b, out=power[: math.prod(shape)].view(shape))
            square = torch.maximum(square, y.amax(1))
            for k, moment in enumerate(self.moments, 2):
                if k > 2:
                    y = y[: len(moment)].mul_(b[: len(moment)])
                moment.addmm_(y, p)
        self.reach = square.sqrt().double()[:, None] * (1 + 1e-6)

    def bounds(self) -> list[torch.Tensor]:
        """Bounds of E|b - c|^(K+1) (n, A) for K = 2, 3, ..., from the second moment and r."""
        second = self.moments[0].double()
        return [second * self.reach ** (degree - 1) for degree in range(2, MAX_DEGREE + 1)]

    def curvature(
        self, moved: torch.Tensor, first: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """C and a bound of its error, (n, A) each; `moved` m and `first` m E[b - c], (n, A)."""
        even, odd = torch.zeros_like(first), torch.zeros_like(first)
        power, last = moved.clone(), torch.zeros_like(first)
        for k, moment in enumerate(self.moments, 2):
            some = slice(0, len(moment))
            power *= moved / k  # m^k / k!
            wide = moment.double()
            (odd if k % 2 else even)[some] += power[some] * wide
            if k % 2 == 0:
                last[some] = wide
        sizes, degrees = moved.abs(), self.degrees[:, None].double()
        # Lagrange, with E|b - c|^(K+1) <= r E[(b - c)^K], K even, or r^2 E[(b - c)^(K-1)], K odd.
        left = last * self.reach ** (1 + degrees % 2) * (sizes * self.reach).exp()
        left *= sizes ** (degrees + 1) * (-torch.lgamma(degrees + 2)).exp()
        total = first + even + odd  # E exp(m (b - c)) - 1
        least = total - left + 1.0
        error = (left + _ROUNDING * even) / least
        error = torch.where(least > 0, error, torch.inf)
        return torch.log1p(total.clamp(min=-0.999999)) - first, error.nan_to_num(nan=torch.inf)


def expectations(
    values: torch.Tensor,
    unembedding: torch.Tensor,
    logits: torch.Tensor,
    moved: torch.Tensor,
    pairs: tuple[torch.Tensor, torch.Tensor],
    centre: torch.Tensor | None,
    cap: float | None,
    block: int,
) -> torch.Tensor:
    """`log sum exp(logits + m b)` of chosen pairs, every token summed: (Q,).

    `pairs` are neurons (Q,) and tokens (Q,). With a `centre` b is taken relative to it; with a
    `cap` c every sum passes `c tanh(x / c)` first, as capped logits do.
    """
    neurons, places = pairs
    rows, which = neurons.unique(return_inverse=True)
    sizes = moved[places, neurons]
    width = min(len(unembedding), max(64, block // max(64, min(len(rows), 4096))))
    room = max(1, block // width)
    total = torch.full_like(sizes, -torch.inf)
    for start in range(0, len(unembedding), width):
        part = slice(start, start + width)
        weight = unembedding[part].float()
        weight = weight if centre is None else weight - centre
        before = logits[:, part]
        for low in range(0, len(rows), room):
            b = values[rows[low : low + room]] @ weight.T
            mine = ((which >= low) & (which < low + room)).nonzero()[:, 0]
            for some in mine.split(room):
                x = b[which[some] - low].mul_(sizes[some, None]).add_(before[places[some]])
                if cap is not None:
                    x = x.div_(cap).tanh_().mul_(cap)
                total[some] = torch.logaddexp(total[some], x.logsumexp(1))
    return total
