"""What every family of models gives, and what ``MaskedModel`` leaves to them."""

import ast
import inspect

import pytest

from fastmae.model.conv import ConvMAE
from fastmae.model.convnext import ConvNeXtMAE
from fastmae.model.cross import CrossMAE
from fastmae.model.family import MaskedModel
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.mlp import MLPMAE

LEFT_TO_FAMILIES = {
    node.name
    for node in ast.walk(ast.parse(inspect.getsource(MaskedModel)))
    if isinstance(node, ast.FunctionDef) and "raise NotImplementedError" in ast.unparse(node)
}


@pytest.mark.parametrize("family", [MaskedAutoencoderViT, CrossMAE, ConvNeXtMAE, ConvMAE, MLPMAE])
def test_a_family_gives_all_that_is_left_to_it(family):
    assert {"loss_and_prediction", "predict", "features", "products", "last_layer"} <= LEFT_TO_FAMILIES
    own = {name for kind in family.__mro__[: family.__mro__.index(MaskedModel)] for name in vars(kind)}
    assert own >= LEFT_TO_FAMILIES
