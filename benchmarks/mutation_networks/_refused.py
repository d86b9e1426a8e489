"""Networks with operators of which nothing may shrink."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mutation_networks._base import A, between, index, to


def total(x: Tensor) -> Tensor:
    """One number for each sample, from whatever was made of it."""
    return x.flatten(1).sum(1)[:, None, None]


def pairs(x: Tensor) -> Tensor:
    """A positive definite matrix of all pairs of units."""
    return x.mT @ x * 0.1 + torch.diag_embed(x.square().mean(1) + 1)


T = "tokens"
for name, made in {
    "linalg_cholesky": torch.linalg.cholesky,
    "linalg_det": torch.linalg.det,
    "linalg_slogdet": lambda g: torch.linalg.slogdet(g)[1],
    "linalg_eigh": lambda g: torch.linalg.eigh(g)[0].sqrt(),
    "linalg_inv": torch.linalg.inv,
    "linalg_matrix_exp": lambda g: torch.linalg.matrix_exp(g * 0.01),
    "matrix_exp": lambda g: A.matrix_exp(g * 0.01),
    "linalg_pinv": torch.linalg.pinv,
    "linalg_qr": lambda g: torch.linalg.qr(g)[1].abs(),
    "linalg_svd": lambda g: torch.linalg.svd(g)[1].sqrt(),
    "linalg_svdvals": lambda g: torch.linalg.svdvals(g).sqrt(),
    "linalg_solve": lambda g: torch.linalg.solve(g, g.sin()),
    "linalg_householder_product": lambda g: torch.linalg.householder_product(g, g[:, 0]),
}.items():  # of a matrix of all pairs of units
    between(name, lambda x, f=made: x * total(f(pairs(x)).unsqueeze(-1)), "square")
between("linalg_cross", lambda x: torch.cat([torch.linalg.cross(x[..., :3], x[..., 3:6]), x[..., :9]], 2), T)
between("as_strided", lambda x: x.as_strided((3, 4), (12, 3)), "features", lambda: nn.Linear(4, 3))
between("view.dtype", lambda x: to(x.view(torch.int64) % 7, x))
between("take", lambda x: x * x.take(index(3, 5))[0])
between("put", lambda x: x.put(index(3, 5), x[0, :2]))
between("masked_scatter", lambda x: x.masked_scatter(x > 0, x.cos()))
between("fill_diagonal_", lambda x: (x.mT @ x)[0].fill_diagonal_(0.5), T)
between("diagonal_scatter", lambda x: (x.mT @ x)[0].diagonal_scatter(x[0, 0]), T)
between(
    "affine_grid_generator",
    lambda x: functional.affine_grid(x.unflatten(1, (2, 2, 3))[:, 0], [3, 1, 2, 2], False).flatten(1),
    "features",
    lambda: nn.Linear(8, 3),
)
between("pdist", lambda x: x * functional.pdist(x.T).sum())
between("histc", lambda x: x * torch.histc(x, 4, -1, 1)[0])
between("searchsorted", lambda x: to(torch.searchsorted(torch.tensor([-0.2, 0.3], dtype=x.dtype), x), x))
between("bincount", lambda x: x * torch.bincount((x[0] > 0).to(torch.int64), minlength=2)[0])
between("nonzero masked_select", lambda x: x * x.masked_select(x > 0).sum() + x.nonzero().sum())
