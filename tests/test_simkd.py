"""SimKD: body, projector and the teacher's own head are one network, which is trained, evaluated and left."""

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import sakd
from sakd.cli import main
from sakd.configuration import build
from sakd.configuration.compose import compose_one
from sakd.distillers import SimKD
from sakd.errors import CheckpointError, ConfigError
from sakd.networks import resnet8, resnet8x4, vgg8, with_head_of, wrn_16_1
from sakd.networks.described import Description
from sakd.runs.job import execute
from tests.conftest import compose_config, fit
from tests.test_distillers import BATCH, INDICES, KEEPS, close, pooled

CPU = torch.device("cpu")


def built(body=resnet8, head=resnet8x4):
    torch.manual_seed(0)
    teacher = head(10, 1, 8).double()
    student = with_head_of(body(10, 1, 8), head(10, 1, 8), narrowing=2).double()
    distiller = SimKD(student, teacher.requires_grad_(False).eval(), "last_stage", 2.5)
    distiller.begin_epoch(1)
    return student, teacher, distiller


@pytest.mark.parametrize(
    ("pair", "kept"),
    [
        *(((resnet8, resnet8x4), kept) for kept in ("all", "some", "none")),
        *(((body, head), "some") for body, head in ((resnet8, vgg8), (vgg8, wrn_16_1))),
    ],
)
def test_the_loss_is_the_kept_share_of_the_published_one_of_the_kept_rows(pair, kept):
    student, teacher, distiller = built(*pair)
    images, rows = torch.randn(BATCH, 1, 8, 8, dtype=torch.float64), torch.tensor(KEEPS[kept])
    f_s, f_t = student.features(images), teacher.features(images)
    loss = distiller(f_s, f_t, {distiller.spots[0]: rows}, INDICES)
    maps = pooled(f_s[student.maps[-1]], f_t[teacher.maps[-1]])
    errors = (maps[0] - maps[1]) ** 2
    close(loss, 2.5 * errors.mean((1, 2, 3))[rows].sum() / BATCH)
    assert loss > 0 or kept == "none"


def test_the_students_logits_are_the_teachers_heads_of_the_projected_map():
    student, teacher, _ = built(head=wrn_16_1)  # whose head begins with a batch norm
    seen = student.train().features(torch.randn(BATCH, 1, 8, 8, dtype=torch.float64))
    close(seen["logits"], teacher.between("stage3", "logits")(seen["stage4"]))


def test_an_average_begins_with_the_teachers_head(tiny):
    config = tiny("distiller=simkd", "teacher=wrn_16_1", "ema=0.99", "dataset.train_samples=48")
    trainer = build.trainer(config, build.parts(config), CPU)
    trainer.prepare(build.dataset(config), 24)
    trainer.begin_epoch()
    head, own = (
        trainer.teacher.network.get_submodule("logits"),
        trainer.average.network.get_submodule("logits"),
    )
    for expected, found in zip(head.parameters(), own.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_network_of_tokens_takes_another_head():
    with torch.device("meta"):
        node = compose_config("student=torchvision_vit_b_16", "dataset=imagenet")["student"]
        body = build.make(node, "student", leave=build.OF_STUDENTS)
        made = with_head_of(body, resnet8x4(1000, 3, 224), narrowing=2)
    assert made.shapes["logits"] == (1000,)


def test_neither_head_nor_teacher_learns_while_body_and_projector_do(tiny):
    config = tiny("distiller=simkd", "teacher=wrn_16_1", "spot_mode=adaptive", "dataset.train_samples=48")
    parts = build.parts(config)
    trainer = build.trainer(config, parts, CPU)
    before = {name: tensor.clone() for name, tensor in parts.student.state_dict().items()}
    fit(trainer, build.dataset(config), 1, 24)
    heads = [network.between(network.maps[-1], "logits") for network in (parts.student, parts.teacher)]
    for own, given in zip(*(head.state_dict().values() for head in heads), strict=True):
        assert torch.equal(own, given)
    for name, tensor in parts.student.named_parameters():
        is_head = name.startswith(("embedding", "logits"))
        assert tensor.requires_grad != is_head
        assert is_head or not torch.equal(tensor, before[name]), name


def test_its_body_starts_as_that_of_any_other_distiller(tiny):
    of_simkd, plain = (build.parts(tiny(f"distiller={name}")).student for name in ("simkd", "kd"))
    for stage in ("stem", "stage1", "stage3"):
        pair = (network.get_submodule(stage).state_dict().values() for network in (of_simkd, plain))
        assert all(torch.equal(*weights) for weights in zip(*pair, strict=True))


def test_what_is_measured_and_saved_and_loaded_is_the_product(tiny, tmp_path):
    small = ("dataset.train_samples=64", "dataset.test_samples=40", "epochs=1", "teacher.training.epochs=1")
    config = tiny("distiller=simkd", "teacher=vgg8", "spot_mode=fixed", *small)
    result = execute(config)
    (folder,) = (tmp_path / "runs").glob("*simkd*")
    file = folder / "student.safetensors"
    (teacher,) = (load_file(path) for path in (tmp_path / "runs").glob("digits-none-*/student.safetensors"))
    weights = load_file(file)
    assert torch.equal(weights["logits.0.weight"], teacher["logits.weight"])
    test = build.dataset(config).test
    for source in (folder, file):  # the file alone says what network it is
        logits = sakd.load(source)(test.images)
        accuracy = 100 * (logits.argmax(1) == test.labels).float().mean()
        assert float(accuracy) == pytest.approx(result["student"]["accuracy"], abs=1e-4)
    done = CliRunner().invoke(main, ["export", str(folder), "--to", "checkpoint"])
    assert done.exit_code == 1
    assert "found resnet8 of sakd.networks.with_head_of, expected a network whose weights" in done.output
    assert not (folder / "student.pth").exists()


def test_a_file_whose_body_is_nobodys_known_network_is_not_built(tmp_path):
    body = {"_target_": "os.system", "command": "true"}
    network = {"_target_": "sakd.networks.with_head_of", "name": "x", "narrowing": 2, "body": body}
    about = Description(network, 10, [1, 8, 8], [0.5], [0.5], "digits", "x")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", about.metadata())
    with pytest.raises(CheckpointError, match=r"found _target_ os\.system, expected a network of sakd"):
        sakd.load(tmp_path / "a.safetensors")


def test_a_student_with_a_head_of_its_own_is_refused():
    with pytest.raises(ConfigError, match="found a student with a head of its own, expected"):
        SimKD(resnet8(10, 1, 8), resnet8x4(10, 1, 8), "last_stage", 1.0)


def test_it_is_refused_where_its_projector_would_not_learn():
    body, head = resnet8(10, 1, 8), resnet8x4(10, 1, 8)
    for where in ("stage2", "stages"):
        with pytest.raises(
            ConfigError, match=f"where={where}: found stage., SimKD takes the last stage alone"
        ):
            SimKD(with_head_of(body, head, narrowing=2), head, where, 1.0)


def test_a_product_that_takes_other_keys_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"distiller\.product\.narrowing: found 0, expected"):
        build.check_parts(compose_config("distiller=simkd", "distiller.product.narrowing=0"))


@pytest.mark.slow
def test_it_stands_beside_others_in_a_sum():
    summed, alone = (compose_one([f"distiller={name}"])["distiller"] for name in ("simkd+at", "simkd"))
    assert set(summed["losses"]) == {"simkd", "kd", "at"}
    assert summed["product"] == alone["product"]
