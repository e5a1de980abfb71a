"""CSR bytes against SciPy's matrices, and networks of a paper in closed form."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from autocompress.sparse.csr import Matrix, account_of, width_of


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 40), st.floats(0, 1))
def test_bytes_are_those_of_the_arrays_of_scipy(seed: int, rows: int, columns: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)) * (rng.random((rows, columns)) < density)
    weight = torch.from_numpy(values.astype(np.float32))
    matrix = sparse.csr_matrix(weight.numpy())
    assert matrix.indices.dtype == matrix.indptr.dtype == np.int32
    found = Matrix.of(weight)
    assert found.csr_bytes == matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes
    assert found.dense_bytes == weight.numpy().nbytes
    small = matrix.data.nbytes + matrix.indices.astype(np.uint8).nbytes
    assert found.small_csr_bytes == small + matrix.indptr.astype(np.min_scalar_type(matrix.nnz)).nbytes


def test_a_filter_is_a_row() -> None:
    assert Matrix.of(torch.ones(6, 2, 3, 3)) == Matrix(rows=6, columns=18, nonzero=108)


# Han et al., NIPS 2015, tables 3 and 4: share of the weights that is kept in each layer.
LENET_300_100 = {(300, 784): 0.08, (100, 300): 0.09, (10, 100): 0.26}
LENET_5 = {(20, 25): 0.66, (50, 500): 0.12, (500, 800): 0.08, (10, 500): 0.19}


@pytest.mark.parametrize(
    ("network", "kept", "of"),
    [(LENET_300_100, 18_816 + 2_700 + 260, 266_200), (LENET_5, 330 + 3_000 + 32_000 + 950, 430_500)],
)
def test_the_lenets_of_the_paper_in_closed_form(
    network: dict[tuple[int, int], float], kept: int, of: int
) -> None:
    matrices = [Matrix(*shape, round(shape[0] * shape[1] * share)) for shape, share in network.items()]
    assert sum(each.nonzero for each in matrices) == kept
    assert sum(each.dense_bytes for each in matrices) == 4 * of
    assert kept / of == pytest.approx(0.08, abs=0.005)  # "8 %" of both, printed as 12x
    rows = sum(shape[0] for shape in network)
    assert sum(each.csr_bytes for each in matrices) == 8 * kept + 4 * (rows + len(network))


def test_it_is_said_where_csr_is_no_smaller() -> None:
    half, few, none = torch.ones(4, 100), torch.zeros(4, 100), torch.zeros(2, 3)
    half[:, ::2] = 0  # 8 bytes a value that is left, and row pointers on top
    few[:, :3] = 1
    found = account_of({"half": half, "few": few, "none": none})
    layers = {layer["name"]: layer for layer in found["csr"]["layers"]}
    assert (layers["half"]["csr_bytes"], layers["half"]["dense_bytes"]) == (1620, 1600)
    assert found["csr"]["total"]["csr_bytes"] == 1620 + (8 * 12 + 20) + 12
    assert found["csr"]["index_bytes"] == 4
    notes = "; ".join(found["notes"])
    assert "no smaller than dense for half;" in notes
    assert "no weight is left in none: lower sparsity" in notes
    assert "the network is not faster by this" in notes


@pytest.mark.parametrize(
    ("largest", "width"), [(0, 1), (255, 1), (256, 2), (65_535, 2), (65_536, 4), (2**32 - 1, 4)]
)
def test_indices_are_as_wide_as_they_have_to_be(largest: int, width: int) -> None:
    assert width_of(largest) == width
