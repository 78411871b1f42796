"""faiss and torch find the same images; a table and a picture say which."""

import numpy as np
import pytest
import torch
from PIL import Image

import fastmae
from fastmae.data.sources import Subset, open_train
from fastmae.evaluate.features import extract_features
from fastmae.evaluate.search import most_similar, save_search, search


def test_faiss_finds_what_torch_finds():
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    among, queries = torch.randn(200, 16), torch.randn(7, 16)
    by_faiss, by_torch = (most_similar(among, queries, 9, by) for by in ("faiss", "torch"))
    torch.testing.assert_close(by_faiss[0], by_torch[0])
    assert torch.equal(by_faiss[1], by_torch[1])


def test_the_picture_has_one_row_per_query_and_one_column_per_image(tmp_path):
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1).eval()
    source = Subset(open_train("digits"), np.arange(40))
    features = extract_features(model, source, pool="mean", batch_size=256, num_workers=1)
    sizes = []
    for k in (2, 5):
        results = search(source, features, source, features, k=k, by="torch")[:3]
        assert all(len(result["found"]) == k for result in results)
        save_search(tmp_path / "s.png", model, source, source, results)
        sizes.append(Image.open(tmp_path / "s.png").size)
    assert sizes[1][0] - sizes[0][0] > 96
    assert sizes[1][1] == sizes[0][1] > 3 * 96
