"""What a finished run says that its policy does is what its stored weights do."""

import csv
import io

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from sakd.cli import main as cli
from sakd.data import digits
from sakd.networks import resnet8
from sakd.runs import Run
from sakd.runs.job import execute


def embeddings_of(weights: bytes, images: torch.Tensor) -> torch.Tensor:
    network = resnet8(10, 1, 8)
    network.load_state_dict(safetensors.torch.load(weights))
    with torch.no_grad():
        return network.eval().features(images)["embedding"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["adaptive", "anti"])
def test_the_policy_test_lists_what_student_teacher_and_policy_say_from_their_files(tiny, mode):
    """Plainly: the teacher where the policy's score for it, of both embeddings, is the larger one."""
    config = tiny("distiller=at", f"spot_mode={mode}", "spot_mode.same_family_bias=0")
    result = execute(config)
    folder = Run(config).folder
    (_, test), node = digits(), config["dataset"]
    images = (test.images / 255 - node["mean"][0]) / node["std"][0]
    teacher = next(path for path in folder.parent.iterdir() if path.name.startswith("digits-none-resnet8"))
    student_embeddings, teacher_embeddings = (
        embeddings_of((own / "student.safetensors").read_bytes(), images) for own in (folder, teacher)
    )
    policy = torch.load(folder / "last.pt", weights_only=True)["trainer"]["spot_mode"]
    scores = torch.cat([teacher_embeddings, student_embeddings], 1) @ policy["policy.weight"].T
    scores = (scores + policy["policy.bias"]).unflatten(1, (-1, 2)).numpy()
    probabilities = 1 / (1 + np.exp(scores[..., 1] - scores[..., 0]))
    for place, spot in enumerate(result["kept"]):
        through_the_teacher = probabilities[:, place] >= 0.5
        kept = through_the_teacher if mode == "adaptive" else ~through_the_teacher
        for which, expected in (("kept", kept), ("skipped", ~kept)):
            asked = ("--split", "test", "--spot", spot, f"--{which}", "--format", "csv")
            done = CliRunner().invoke(cli, ["spots", str(folder), *asked])
            assert done.exit_code == 0, done.output
            rows = list(csv.DictReader(io.StringIO(done.output)))
            (places,) = np.nonzero(expected)
            assert [int(row["index"]) for row in rows] == places.tolist()
            assert [int(row["label"]) for row in rows] == test.labels[places].tolist()
            told = [float(row["probability"]) for row in rows]
            assert told == pytest.approx(probabilities[places, place].tolist(), abs=1e-5)
    choices = probabilities >= 0.5
    assert choices.any(), "the policy chooses"
    assert not choices.all(), "the policy chooses"
