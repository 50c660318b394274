"""Which tokens of a call are real. Key: B batch, T tokens, D rows of the layout, L tokens of the longest row."""

import pytest
import torch

from subquad import UserError
from subquad.linearize.calls import CallNote, Mode, Root
from subquad.linearize.layout import packed, padded

MASKS = {
    "left": [[0, 0, 1, 1], [0, 1, 1, 1]],
    "right": [[1, 1, 0, 0], [1, 1, 1, 0]],
    "holes": [[1, 0, 1, 0], [0, 1, 0, 1]],
    "an empty row": [[0, 0, 0, 0], [1, 1, 1, 1]],
}


@pytest.mark.parametrize("what", MASKS)
def test_real_tokens_come_first_and_in_order(what):
    mask = torch.tensor(MASKS[what])
    layout, x = padded(mask), torch.arange(8).view(2, 4)
    gathered = layout.gather(x)
    for row in range(2):
        assert gathered[row, layout.real_DL[row]].tolist() == x[row, mask[row].bool()].tolist()
    assert layout.counts_D.tolist() == mask.sum(1).tolist() and layout.fewest == mask.sum(1).min()
    assert torch.equal(layout.scatter(gathered, 2, 4), x * mask)


def test_no_layout_where_every_token_is_real():
    assert padded(torch.ones(2, 4)) is None
    assert packed(torch.arange(4).expand(2, -1), 2) is None
    assert packed(torch.arange(7, 11)[None], 2) is None  # positions may start anywhere, and be given once for all rows


def test_documents_become_rows():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    layout, x = packed(positions, 2), torch.arange(10).view(2, 5)
    rows = [layout.gather(x)[d, layout.real_DL[d]].tolist() for d in range(4)]
    assert rows == [[0, 1, 2], [3, 4], [5], [6, 7, 8, 9]]
    assert torch.equal(layout.scatter(layout.gather(x), 2, 5), x)


def note_of(mask=None, position_ids=None) -> CallNote:
    return CallNote.outermost(Mode(), mask, position_ids)


def test_only_this_calls_columns_of_the_mask_count():
    note = note_of(torch.tensor([[0, 0, 1, 1, 1]]))
    assert note.layout(1, 3, cached=True) is None
    assert note.layout(1, 4, cached=True).counts_D.tolist() == [3]
    assert note.padding(1, 3) is None and note.padding(1, 4).tolist() == [[False, True, True, True]]


def test_a_new_call_forgets_the_last_one():
    root, model = Root(), torch.nn.Identity()
    root.enter(model, torch.tensor([[0, 1]]), None)
    first = root.note
    root.leave(model)
    assert root.note.layout(1, 2, cached=False) is None
    for end in (root.leave, lambda model: None):  # a Ctrl-C in the middle of a call: nobody tells of its end
        root.enter(model, None, None)
        assert root.note.layout(1, 2, cached=False) is None
        end(model)
    root.enter(model, torch.tensor([[1, 1]]), None)
    assert root.note.mask_BS is not None and len(root.calls) == 1
    assert first.layout(1, 2, cached=False).counts_D.tolist() == [1], "checkpointed layers run again when other calls have been made"


def test_inner_calls_keep_the_outer_mask():
    """The base model inside the language model is handed a mask that the outer one may already have expanded."""
    note = note_of(torch.tensor([[0, 1]]))
    inner = note.inner(torch.zeros(1, 1, 2, 2), torch.tensor([[0, 0]]))
    assert inner.layout(1, 2, cached=False).counts_D.tolist() == [1]
    assert inner.position_ids is not None and note.position_ids is None


def test_positions_mean_packing_only_without_mask_and_cache():
    positions = torch.tensor([[0, 1, 0]])
    assert note_of(None, positions).layout(1, 3, cached=False) is not None
    assert note_of(None, positions).layout(1, 3, cached=True) is None
    assert note_of(torch.ones(1, 3), positions).layout(1, 3, cached=False) is None


REFUSED = {
    "4-D": (torch.zeros(2, 1, 4, 4), r"\(2, 1, 4, 4\).*2-D padding mask"),
    "3-D": (torch.zeros(2, 4, 4), "2-D padding mask"),
    "too narrow": (torch.tensor([[0, 1, 1], [1, 1, 1]]), r"\(2, 3\) but the call has 2 rows of 4"),
    "other batch": (torch.zeros(3, 4), "2 rows"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_masks_that_cannot_be_honoured(what):
    mask, words = REFUSED[what]
    with pytest.raises(UserError, match=words):
        note_of(mask).layout(2, 4, cached=True)
