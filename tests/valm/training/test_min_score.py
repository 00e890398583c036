"""Documents of which the tokens with weak images see none, and the twins of a model that is trained on them."""

import numpy as np
import pytest
import torch

from tests.valm.training.documents import Vectors, documents, new_model, new_trainer
from tests.valm.training.test_train import augmented
from valm.errors import ValmError
from valm.retrieval.min_score import cut
from valm.training.image_trainer import FUSION_NAME
from valm.training.min_score import WithMinScore, with_min_score
from valm.training.twins import twin


@pytest.fixture
def scored():
    """Documents with scores; one is exactly at 0.5."""
    random = np.random.default_rng(0)
    made = []
    for document in documents():
        scores = random.uniform(0, 0.7, document["image_ids"].shape).astype(np.float32)
        scores[0] = 0.5
        made.append(
            document | {"image_scores": np.where(document["image_ids"] < 0, -np.inf, scores).astype(np.float32)}
        )
    return made


def test_all_images_of_a_token_or_none(scored):
    found = WithMinScore(scored, 0.5)
    assert len(found) == len(scored) and found.lengths().tolist() == [len(one["input_ids"]) for one in scored]
    kept = 0
    for document, one in zip(scored, found, strict=True):
        keep = (document["image_scores"] >= 0.5).any(-1)
        kept += keep.mean() / len(scored)
        assert np.array_equal(one["image_ids"][keep], document["image_ids"][keep])
        assert (one["image_ids"][~keep] == -1).all() and (one["image_scores"][~keep] == -np.inf).all()
        assert one["image_ids"].dtype == np.int64 and one["image_scores"].dtype == np.float32
        assert keep[0] == (document["image_ids"][0] >= 0).any()
    assert 0.2 < kept < 0.8


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_a_twin_has_images_where_the_model_has(scored, kind):
    seen = WithMinScore(scored, 0.5)
    made = twin(kind, seen, 40, seed=1)
    for document, one in zip(seen, made, strict=True):
        assert np.array_equal((document["image_ids"] >= 0).any(-1), (one["image_ids"] >= 0).any(-1))
        assert not np.array_equal(document["image_ids"], one["image_ids"])
    assert with_min_score(made, 0.5) is made
    for other in (0.6, None):
        with pytest.raises(ValmError, match=rf"the documents have the min_score 0\.5, but the model's is {other}"):
            with_min_score(made, other)


def test_the_trainer_cuts_by_the_models_min_score(scored, tmp_path):
    def weights(name, model, dataset):
        made = new_trainer(tmp_path / name, model=model, dataset=dataset, max_steps=2)
        made.train()
        return {key: tensor.clone() for key, tensor in made.model.state_dict().items()}

    cut = weights("cut", new_model(min_score=0.5), scored)
    given = weights("given", new_model(), list(WithMinScore(scored, 0.5)))
    uncut = weights("uncut", new_model(), scored)
    assert all((cut[name] == given[name]).all() for name in cut)
    assert any((cut[name] != uncut[name]).any() for name in cut)


def test_a_min_score_that_hides_every_image_is_said(scored):
    with pytest.warns(UserWarning, match=r"at min_score 7\.0 no token of the first 8 documents .* score is 0\.6\d\d"):
        with_min_score(scored, 7.0)


@pytest.mark.filterwarnings("ignore:at min_score 2.0")
@pytest.mark.parametrize("unfreeze", [None, "block"])
def test_a_step_without_any_image_has_gradients_of_all_parameters(scored, tmp_path, unfreeze):
    """Otherwise one whose other parameters are frozen would have nothing to train, and processes would not agree."""
    given = {} if unfreeze is None else {"unfreeze": unfreeze}
    made = new_trainer(tmp_path, model=augmented(min_score=2.0, **given), dataset=scored, weight_decay=0)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    batch = made.data_collator([made.train_dataset[index] for index in range(3)])
    assert len(batch["image_pool"]) == 0
    made.model.train()
    made.model(**batch).loss.backward()
    trained = {name: tensor for name, tensor in made.model.named_parameters() if tensor.requires_grad}
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in trained.values())
    seen = {name for name, tensor in trained.items() if tensor.grad.any()}
    assert not any(FUSION_NAME in name for name in seen) and bool(seen) == (unfreeze == "block")
    made.model.zero_grad()
    made.train()
    after = made.model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} <= seen


def test_a_number_of_numpys_cuts_as_one_of_pythons():
    """NumPy compares its own 0.7 with float32 scores in float64, where a score that was rounded to 0.7 is below."""
    ids, scores = torch.tensor([[3]]), torch.tensor([[0.7]])
    for number in (0.7, np.float64(0.7), np.float32(0.7)):
        assert cut(ids, scores, number)[0].equal(ids)


def test_ids_that_cannot_say_no_image_are_refused(scored):
    unsigned = [document | {"image_ids": document["image_ids"].astype(np.uint32)} for document in scored]
    with pytest.raises(ValmError, match="image_ids of document 0 are uint32, which has no -1"):
        with_min_score(unsigned, 0.5)


def test_what_is_evaluated_on_is_cut_too(scored, tmp_path):
    def loss(model, eval_dataset):
        made = new_trainer(tmp_path, model=model, dataset=scored, eval_dataset=eval_dataset)
        return made.evaluate()["eval_loss"]

    cut = loss(new_model(min_score=0.5), scored)
    assert cut == loss(new_model(), list(WithMinScore(scored, 0.5))) != loss(new_model(), scored)


def test_what_a_trainer_is_given_to_evaluate_is_what_its_own_documents_are(scored, tmp_path):
    """Cut by the min_score, and into blocks that the model can read."""
    long = [{name: np.concatenate([values] * 9) for name, values in document.items()} for document in scored]
    own = new_trainer(tmp_path, model=new_model(min_score=0.5), dataset=scored, eval_dataset=long)
    other = new_trainer(tmp_path, model=new_model(min_score=0.5), dataset=scored, eval_dataset=scored)
    expected = own.evaluate()["eval_loss"]
    assert own.evaluate(own.eval_dataset)["eval_loss"] == other.evaluate(long)["eval_loss"] == expected
    assert other.predict(long).metrics["test_loss"] == expected
    with pytest.raises(ValmError, match="for a model with a min_score, has no retrieval scores"):
        other.evaluate(documents())


def test_documents_without_scores_are_refused_before_the_training(tmp_path):
    with pytest.raises(ValmError, match="for a model with a min_score, has no retrieval scores: retrieve it again"):
        new_trainer(tmp_path, model=new_model(min_score=0.5))
    with pytest.raises(ValmError, match="a streamed dataset has no min_score"):
        with_min_score(iter(documents()), 0.5)
    assert with_min_score(iter(()), None) is not None and Vectors().dim == 24
