"""Networks with operators of which nothing may shrink."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mutation_networks._base import A, between, index, to


def square(x: Tensor) -> Tensor:
    """A matrix that is positive definite, of twelve units."""
    return x.mT @ x + torch.eye(12, dtype=x.dtype) * 3


T = "tokens"
between("linalg_cholesky", lambda x: x @ torch.linalg.cholesky(square(x)), T)
between("linalg_det", lambda x: x * torch.linalg.det(square(x))[:, None, None], T)
between("linalg_slogdet", lambda x: x * torch.linalg.slogdet(square(x))[1][:, None, None], T)
between("linalg_eigh", lambda x: x * torch.linalg.eigh(square(x))[0][:, None], T)
between("linalg_householder_product", lambda x: torch.linalg.householder_product(x.mT, x[:, :, 0]).mT, T)
between("linalg_inv", lambda x: x @ torch.linalg.inv(square(x)), T)
between("linalg_matrix_exp", lambda x: x @ torch.linalg.matrix_exp(square(x) * 0.01), T)
between("matrix_exp", lambda x: x @ A.matrix_exp(square(x) * 0.01), T)
between("linalg_pinv", lambda x: x @ torch.linalg.pinv(square(x)), T)
between("linalg_qr", lambda x: torch.linalg.qr(x)[1], T)
between("linalg_solve", lambda x: torch.linalg.solve(square(x), x.mT).mT, T)
between("linalg_svd", lambda x: x * torch.linalg.svd(square(x))[1][:, None], T)
between("linalg_svdvals", lambda x: x * torch.linalg.svdvals(square(x))[:, None], T)
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
