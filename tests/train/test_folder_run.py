import sys

from training_helpers import with_torchvision

from pyext import cli


@with_torchvision
def test_image_folder_is_trained_on_scored_and_predicted(image_folder, tmp_path, capsys):
    output = str(tmp_path / "run")
    command = ["train", "hcgnet", "--arch", "tiny", "--data", str(image_folder), "--image-size", "16"]
    command += ["--batch-size", "8", "--epochs", "12", "--lr", "0.05", "--mixup", "0", "--output", output]
    assert cli.main(command) == 0
    assert "24 training and 9 held-out images of 3 classes" in capsys.readouterr().out
    assert cli.main(["eval", output]) == 0
    assert "top-1 100.00%, top-5 100.00%" in capsys.readouterr().out
    files = [str(image_folder / "val" / name / "0.png") for name in ("green", "red", "blue")]
    assert cli.main(["predict", output, *files, "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split()[0] for line in lines] == ["green", "red", "blue"]


@with_torchvision
def test_bad_image_ends_the_training_with_its_name(image_folder, tmp_path, capsys):
    (image_folder / "train" / "red" / "3.png").write_text("no image")
    command = ["train", "hcgnet", "--arch", "tiny", "--data", str(image_folder), "--image-size", "16"]
    assert cli.main([*command, "--batch-size", "8", "--workers", "2", "--output", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("pyext: cannot read ")
    assert "3.png as an image" in err
    assert err.count("\n") == 1


def test_tensorboard_that_is_missing_is_named_before_the_first_step(train, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    train("--epochs", "1", "--tensorboard", status=1)
    assert "--tensorboard needs torch.utils.tensorboard" in capsys.readouterr().err
