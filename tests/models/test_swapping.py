"""What changes in a folder of models takes over while requests go on: none is lost, none is mixed, nothing is left."""

import errno
import gc
import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from fakes import wait_until
from multiplying import product, times
from test_repository import factor, house, look_twice, serve

import run_keras_server as server
from keras_server import telemetry
from keras_server.models import repository as repositories
from keras_server.models.batcher import ModelDied, Overdue
from keras_server.models.errors import StartupError
from keras_server.models.export import Cache, keep
from keras_server.models.registry import NotServed, UnknownModel
from keras_server.models.repository import Repository
from keras_server.models.served import Served
from keras_server.ticket import TICKET, Ticket

__all__ = ["house", "serve"]  # fixtures
Serve = Callable[..., Repository]


def loads(name: str, outcome: str) -> float:
    return (
        telemetry.METRICS.get_sample_value("keras_server_model_loads_total", {"model": name, "outcome": outcome}) or 0
    )


def test_a_new_version_takes_over_and_an_old_one_ends(serve: Serve) -> None:
    times(Path("m/cats/1/model.xml"), 1)
    served = serve("--model-dir", "m")
    old = served.take("cats")
    times(Path("m/cats/2/model.xml"), 2)
    served.look()
    assert factor(served, "cats") == 1  # it may still be being written
    served.look()
    assert factor(served, "cats") == 2
    assert [each.version_name for each in served.versions("cats")] == ["2"]
    assert float(old.compute([np.ones((1, 3), np.float32)])[0][0, 0]) == 1, "the request that has it ends on it"
    assert not old.closed
    old.let_go()
    assert old.closed
    shutil.rmtree("m/cats/2")
    look_twice(served)
    assert factor(served, "cats") == 1, "gone, so that the one before is served again"


def test_a_changed_file_takes_over_and_a_removed_one_ends(serve: Serve) -> None:
    times(Path("m/cats.xml"), 1)
    times(Path("m/dogs.xml"), 5)
    served = serve("--model-dir", "m")
    times(Path("m/cats.xml"), 2)
    times(Path("m/new.xml"), 3)
    look_twice(served)
    assert [factor(served, name) for name in ("cats", "dogs", "new")] == [2, 5, 3]
    assert served.find("cats").title == {"model": "cats"}
    for ending in ("xml", "bin"):
        Path(f"m/dogs.{ending}").unlink()
    look_twice(served)
    with pytest.raises(UnknownModel, match="this server has"):
        served.find("dogs")
    assert served.names() == ("cats", "new")


def test_nothing_is_loaded_twice(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    times(Path("m/cats/1/model.xml"), 1)
    Path("m/cats/2").write_text("text")
    served = serve("--model-dir", "m")
    monkeypatch.setattr(repositories, "serve_source", lambda *_: pytest.fail("it was loaded anew"))
    for _ in range(3):
        served.look()
    os.utime("m/cats/1", (1, 1))
    look_twice(served)
    assert factor(served, "cats") == 1


def test_what_was_refused_for_a_passing_reason_is_tried_again_when_told_to(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    times(Path("m/cats/1/model.xml"), 1)
    served = serve("--model-dir", "m")
    times(Path("m/cats/2/model.xml"), 2)
    with monkeypatch.context() as full:
        full.setattr(repositories, "serve_source", raises(OSError(errno.ENOSPC, "No space left on device")))
        look_twice(served)
    assert "version 2 of cats is not served: [Errno 28] No space left" in caplog.text
    assert "No space left" in served.reason("cats")
    look_twice(served)
    assert served.find("cats").version_name == "1"
    served.look_soon()
    wait_until(lambda: served.find("cats").version_name == "2")
    assert not served.refused


def raises(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


def test_a_broken_one_is_refused_once_and_the_old_one_stays(serve: Serve, caplog: Any) -> None:
    times(Path("m/cats/1/model.xml"), 1)
    served = serve("--model-dir", "m")
    before = loads("cats", "refused"), loads("cats", "loaded")
    Path("m/cats/2").mkdir()
    Path("m/cats/2/model.keras").write_bytes(b"PK\x03\x04 cut off")
    for _ in range(4):
        served.look()
    assert factor(served, "cats") == 1
    assert (loads("cats", "refused"), loads("cats", "loaded")) == (before[0] + 1, before[1])
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith("version 2 of cats is not served: m/cats/2/model.keras is not a Keras model, but cut off")
    assert served.problem(30) == ""
    shutil.rmtree("m/cats/2")
    times(Path("m/cats/2/model.xml"), 2)
    look_twice(served)
    assert factor(served, "cats") == 2


def test_a_broken_new_model_leaves_the_server_ready(serve: Serve) -> None:
    times(Path("m/cats.xml"), 1)
    served = serve("--model-dir", "m")
    Path("m/dogs.keras").write_text("text")
    look_twice(served)
    assert served.problem(30) == ""
    with pytest.raises(UnknownModel):
        served.find("dogs")
    rows = {(row["name"], row["state"]): row["reason"] for row in served.index()}
    assert rows["cats", "READY"] == ""
    assert "dogs.keras is not a Keras model" in rows["dogs", "UNAVAILABLE"]


def test_what_is_still_being_written_is_left_alone(serve: Serve, caplog: Any) -> None:
    """A file that grows from look to look, and is whole at last."""
    whole = times(Path("whole.xml"), 2).with_suffix(".bin").read_bytes()
    times(Path("m/cats.xml"), 1)
    served = serve("--model-dir", "m")
    before = loads("cats", "refused"), loads("cats", "loaded")
    shutil.copy("whole.xml", "m/cats.xml")
    for size in range(1, len(whole) + 1, 3):
        Path("m/cats.bin").write_bytes(whole[:size])
        served.look()
        assert served.unsettled
        assert factor(served, "cats") == 1
    Path("m/cats.bin").write_bytes(whole)
    look_twice(served)
    assert factor(served, "cats") == 2
    assert not served.unsettled
    assert (loads("cats", "refused"), loads("cats", "loaded")) == (before[0], before[1] + 1)


def test_what_changes_while_it_is_loaded_is_not_served(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    times(Path("m/cats.xml"), 1)
    served = serve("--model-dir", "m")
    real = repositories.serve_source

    def slowly(*arguments: Any) -> Served:
        made = real(*arguments)
        times(Path("m/cats.xml"), 3)
        monkeypatch.setattr(repositories, "serve_source", real)
        return made

    monkeypatch.setattr(repositories, "serve_source", slowly)
    times(Path("m/cats.xml"), 2)
    look_twice(served)
    assert factor(served, "cats") == 1
    look_twice(served)
    assert factor(served, "cats") == 3


def test_the_settings_beside_it_are_followed_too(serve: Serve) -> None:
    times(Path("m/cats/1/model.xml"), 1)
    times(Path("m/cats/2/model.xml"), 2)
    served = serve("--model-dir", "m", "--versions", "2")
    first = served.find("cats", "1")
    Path("m/cats.toml").write_text("[version_labels]\nstable = 1")
    served.look()
    assert factor(served, "cats", None, "stable") == 1
    assert served.find("cats", "1") is first, "a label moves, and nothing is loaded anew"
    Path("m/cats.toml").write_text('crop = "centre"\n[version_labels]\nstable = 2')
    look_twice(served)
    assert factor(served, "cats", None, "stable") == 2
    settings = served.find("cats").settings
    assert settings
    assert settings.crop == "centre"
    Path("m/cats.toml").write_text("crop = ")
    look_twice(served)
    assert factor(served, "cats") == 2


def test_what_model_names_is_served_until_something_takes_its_place(serve: Serve) -> None:
    times(Path("cats.xml"), 1)
    served = serve("--model", "cats.xml", "--watch", "1000")
    Path("cats.xml").unlink()
    look_twice(served)
    assert factor(served, "cats") == 1
    times(Path("cats.xml"), 2)
    look_twice(served)
    assert factor(served, "cats") == 2


def test_the_thread_looks_by_itself(serve: Serve) -> None:
    times(Path("m/cats/1/model.xml"), 1)
    served = serve("--model-dir", "m", "--watch", "0.05")
    times(Path("m/cats/2/model.xml"), 2)
    wait_until(lambda: factor(served, "cats") == 2)


def test_a_signal_has_it_look_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repositories, "SETTLED_SECONDS", 0.05)
    times(Path("m/cats/1/model.xml"), 1)
    served = serve("--model-dir", "m")
    times(Path("m/cats/2/model.xml"), 2)
    time.sleep(0.3)
    assert factor(served, "cats") == 1
    served.look_soon()
    wait_until(lambda: factor(served, "cats") == 2)


def test_a_folder_that_is_away_for_a_moment(serve: Serve) -> None:
    times(Path("m/cats.xml"), 1)
    served = serve("--model-dir", "m")
    Path("m").rename("away")
    look_twice(served)
    assert factor(served, "cats") == 1
    Path("away").rename("m")
    look_twice(served)
    assert factor(served, "cats") == 1


def test_a_folder_whose_disk_is_mounted_no_more(serve: Serve, caplog: Any) -> None:
    times(Path("m/cats.xml"), 1)
    times(Path("other.xml"), 3)
    served = serve("--model-dir", "m", "--model", "other.xml")
    Path("m").rename("away")
    Path("m").mkdir()
    look_twice(served)
    assert (factor(served, "cats"), factor(served, "other")) == (1, 3)
    assert "m has no model any more, or no disk: what is served stays" in caplog.text
    times(Path("m/dogs.xml"), 2)
    look_twice(served)
    assert served.names() == ("other", "dogs")


def test_loading_and_unloading_by_request(serve: Serve) -> None:
    times(Path("m/cats.xml"), 1)
    times(Path("m/dogs.xml"), 2)
    times(Path("other.xml"), 3)
    served = serve("--model-dir", "m", "--model", "other.xml")
    served.unload("cats")
    look_twice(served)
    with pytest.raises(UnknownModel):
        served.find("cats")
    assert {"name": "cats", "state": "UNAVAILABLE", "reason": "unloaded"} in served.index()
    served.load("cats")
    assert factor(served, "cats") == 1
    assert {"name": "cats", "version": "1", "state": "READY", "reason": ""} in served.index()
    times(Path("m/cats.xml"), 4)
    served.load("cats")
    assert factor(served, "cats") == 4
    times(Path("m/new.xml"), 5)
    served.load("new")
    assert factor(served, "new") == 5
    Path("m/cats.xml").write_text("text")
    with pytest.raises(StartupError, match="but a text file"):
        served.load("cats")
    assert factor(served, "cats") == 4, "the old one stays"
    for name in ("other", "hats", "..", "../other", "m", ""):
        for act in (served.load, served.unload):
            with pytest.raises(UnknownModel, match="in the folder of --model-dir: it has cats, dogs, new"):
                act(name)


def test_an_unload_is_forgotten_with_a_load_or_once_the_model_is_gone(serve: Serve) -> None:
    times(Path("m/cats.xml"), 1)
    times(Path("m/dogs.xml"), 2)
    served = serve("--model-dir", "m")
    served.unload("cats")
    served.load("cats")
    times(Path("m/cats.xml"), 3)
    look_twice(served)
    assert factor(served, "cats") == 3  # which is followed again
    assert {row["state"] for row in served.index()} == {"READY"}
    served.unload("cats")
    Path("m/cats.xml").unlink()
    Path("m/cats.bin").unlink()
    look_twice(served)
    assert [row["name"] for row in served.index()] == ["dogs"]
    times(Path("m/cats.xml"), 4)
    look_twice(served)
    assert factor(served, "cats") == 4


def test_requests_load_and_unload_by_tritons_protocol(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, setting: Callable[..., None]
) -> None:
    times(Path("m/cats.xml"), 1)
    times(Path("m/dogs.xml"), 2)
    monkeypatch.setattr(server, "model", serve("--model-dir", "m"))
    client = server.app.test_client()
    wanted = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 1, 1]}]}

    def ask(path: str, **body: Any) -> tuple[int, Any]:
        answer = client.post(f"/v2/{path}", json=body, headers={"Authorization": "Bearer secret"})
        return answer.status_code, answer.json

    assert ask("repository/models/cats/unload")[0] == 403
    setting(api_key=("secret",))
    assert ask("repository/models/cats/unload") == (200, {})
    assert ask("models/cats/infer", **wanted)[0] == 404
    assert {"name": "cats", "state": "UNAVAILABLE", "reason": "unloaded"} in ask("repository/index")[1]
    assert [row["name"] for row in ask("repository/index", ready=True)[1]] == ["dogs"]
    status, answer = ask("repository/models/cats/load", parameters={"config": "{}"})
    assert (status, answer["error"]) == (400, "A model is loaded as it is in the folder: send no parameters.")
    assert ask("repository/models/cats/load", parameters={}) == (200, {})
    assert ask("models/cats/infer", **wanted)[1]["outputs"][0]["data"] == [1, 1, 1]
    Path("m/cats.xml").write_text("text")
    status, answer = ask("repository/models/cats/load")
    assert status == 400
    assert "but a text file" in answer["error"]
    shutil.rmtree("m")
    status, answer = ask("repository/models/cats/unload")
    assert status == 400
    assert answer["error"].startswith("--model-dir: m cannot be read")
    assert ask("models/dogs/infer", **wanted)[1]["outputs"][0]["data"] == [2, 2, 2]


def test_models_that_were_named_are_not_loaded_by_request(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, setting: Callable[..., None]
) -> None:
    times(Path("cats.xml"), 1)
    monkeypatch.setattr(server, "model", serve("--model", "cats.xml", "--watch", "1000"))
    setting(api_key=("secret",))
    for act in ("load", "unload"):
        path, key = f"/v2/repository/models/cats/{act}", {"Authorization": "Bearer secret"}
        answer = server.app.test_client().post(path, headers=key)
        assert answer.status_code == 403
        assert answer.json
        assert answer.json["error"].endswith("start the server with --model-dir.")


class Ends:
    """Ends its thread at the first batch, as no model should."""

    lanes = 1

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        raise SystemExit


def kill(served: Served) -> None:
    """End the thread of a model."""
    served.batcher.run = Ends()
    with pytest.raises(ModelDied):
        served.compute([np.ones((1, 3), np.float32)])
    # Else pytest may hear of its exception in the test after this one.
    wait_until(lambda: not all(thread.is_alive() for thread in served.batcher.threads))


@pytest.mark.filterwarnings("ignore:Exception in thread:pytest.PytestUnhandledThreadExceptionWarning")
def test_one_whose_thread_ends_is_loaded_again(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    times(Path("m/cats.xml"), 1)
    times(Path("m/dogs.xml"), 2)
    served = serve("--model-dir", "m")
    ended: list[bool] = []
    served.on_death(lambda: ended.append(True))
    with served.loading:  # so that it is seen in between
        kill(served.find("cats"))
        wait_until(lambda: served.problem(30))
        assert served.problem(30) == "cats: Its thread has ended: it is being loaded again."
        for name in ("cats", None):  # another model's labels would be wrong ones
            with pytest.raises(NotServed, match="cats is not served: Its thread has ended"):
                served.find(name)
        assert factor(served, "dogs") == 2
    wait_until(lambda: not served.problem(30))
    assert factor(served, "cats") == 1
    assert factor(served) == 1
    assert served.names() == ("cats", "dogs")
    Path("m/cats.xml").write_text("text")
    kill(served.find("cats"))
    wait_until(lambda: "text file" in served.problem(30))
    assert not ended


@pytest.mark.filterwarnings("ignore:Exception in thread:pytest.PytestUnhandledThreadExceptionWarning")
def test_the_only_one_ends_the_process(serve: Serve) -> None:
    times(Path("m/cats.xml"), 1)
    served = serve("--model-dir", "m")
    ended: list[bool] = []
    served.on_death(lambda: ended.append(True))
    kill(served.find("cats"))
    wait_until(lambda: ended)
    assert served.problem(30) == "The model's thread has ended."


def test_no_request_is_lost_or_mixed_in_fifty_swaps_and_nothing_is_left(serve: Serve) -> None:
    """Each answer is of the version that it names, in all of its rows; threads and files are as many as before."""
    times(Path("m/cats/1/model.xml"), 1)
    served = serve("--model-dir", "m")
    asking, answered = True, [0] * 8

    def ask(client: int) -> None:
        rows = np.ones((5, 3), np.float32)
        while asking:
            taken = served.take("cats")
            try:
                (y,) = taken.compute([rows])
                assert y.shape == (5, 3)
                assert (y == float(taken.version_name)).all()
            finally:
                taken.let_go()
            answered[client] += 1

    def figures() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    gone: list[weakref.ref[Served]] = []
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(ask, number) for number in range(8)]
        wait_until(lambda: all(answered))
        before = figures()
        for number in range(2, 52):
            times(Path(f"m/cats/{number}/model.xml"), number)
            gone.append(weakref.ref(served.find("cats")))
            so_far = sum(answered)
            look_twice(served)
            assert served.find("cats").version_name == str(number)
            shutil.rmtree(f"m/cats/{number - 1}")
            wait_until(lambda so_far=so_far: sum(answered) > so_far + 8)  # type: ignore[misc]
        wait_until(lambda: figures() == before)
        asking = False
        for client in clients:
            client.result(30)
    wait_until(lambda: not any(reference() for reference in gone))
    series = telemetry.prometheus.generate_latest(telemetry.METRICS).decode()
    assert {line for line in series.splitlines() if 'images_total{model="cats"' in line} == {
        'keras_server_images_total{model="cats",version="51"} 0.0'
    }


def test_twenty_side_by_side(serve: Serve) -> None:
    """Of 4 MB each."""
    for number in range(20):
        times(Path(f"m/model{number}.xml"), number, size=10**6)
    served = serve("--model-dir", "m", "--engine-threads", "1")
    assert len(served.names()) == 20
    for number in range(20):
        taken = served.take(f"model{number}")
        (y,) = taken.compute([np.full((1, 10**6), 2, np.float32)])
        assert (y == 2 * number).all()
        taken.let_go()


def test_the_cache_keeps_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long ago it was opened: its heat maps are read once somebody asks for them."""
    monkeypatch.setattr(Cache, "ENTRIES", 1)

    def write(name: str) -> Path:
        Path(name).write_text(name)
        kept = Cache("cache", name, [Path(name)])
        assert kept.write({"model": product(2)}, {})
        return kept.entry

    first = write("first")
    held = keep(first)
    assert held
    second, third = write("second"), write("third")
    assert first.exists()
    assert not second.exists()
    assert third.exists()
    held.close()
    fourth = write("fourth")
    assert {*Path("cache").iterdir()} == {fourth}


def test_the_old_one_stays_while_its_successor_is_not_ready(serve: Serve) -> None:
    """Whoever removes version 1 too early, or puts a broken one in its place, does not take the model away."""
    times(Path("m/cats/1/model.xml"), 1)
    served = serve("--model-dir", "m")
    times(Path("m/cats/2/model.xml"), 2)
    shutil.rmtree("m/cats/1")
    served.look()
    assert factor(served, "cats") == 1
    served.look()
    assert factor(served, "cats") == 2
    shutil.rmtree("m/cats/2")
    Path("m/cats/3").write_text("text")
    look_twice(served)
    assert factor(served, "cats") == 2


@pytest.mark.filterwarnings("ignore:Exception in thread:pytest.PytestUnhandledThreadExceptionWarning")
def test_one_that_was_unloaded_is_not_loaded_again_for_its_thread_has_ended(serve: Serve) -> None:
    for number, name in enumerate(("cats", "dogs", "birds")):
        times(Path(f"m/{name}.xml"), number)
    served = serve("--model-dir", "m")
    with served.loading:
        kill(served.find("cats"))
        wait_until(lambda: served.problem(30))
        served.unloaded.add("cats")
        served.remove("cats")
    Path("m").rename("away")  # so that no place can be found
    kill(served.find("dogs"))
    wait_until(lambda: "m cannot be read" in served.problem(30))
    assert served.names() == ("birds",)
    Path("away").rename("m")
    look_twice(served)
    assert served.names() == ("birds", "dogs")


def test_the_default_stays_the_default(serve: Serve) -> None:
    """Also once it has been unloaded, loaded, removed, and is there again."""
    times(Path("m/cats.xml"), 1)
    times(Path("m/dogs.xml"), 2)
    served = serve("--model-dir", "m")
    served.unload("cats")
    assert (factor(served), served.names()) == (2, ("dogs",))
    served.load("cats")
    assert (factor(served), served.names()) == (1, ("cats", "dogs"))
    Path("m/cats.xml").rename("cats.xml")
    look_twice(served)
    assert served.names() == ("dogs",)
    Path("cats.xml").rename("m/cats.xml")
    look_twice(served)
    assert (factor(served), served.names()) == (1, ("cats", "dogs"))


def test_a_label_stands_for_its_old_version_until_the_new_one_is_served(serve: Serve) -> None:
    times(Path("m/cats/1/model.xml"), 1)
    toml = Path("m/cats.toml")
    toml.write_text("[version_labels]\nstable = 1")
    served = serve("--model-dir", "m")
    times(Path("m/cats/2/model.xml"), 2)
    toml.write_text("[version_labels]\nstable = 2\nnext = 3")
    served.look()
    assert factor(served, "cats", None, "stable") == 1
    with pytest.raises(UnknownModel, match='There is no version "3" of cats'):
        served.find("cats", None, "next")
    served.look()
    assert factor(served, "cats", None, "stable") == 2


def test_what_is_gone_or_good_again_is_not_said_to_be_refused(serve: Serve) -> None:
    times(Path("m/cats/1/model.xml"), 1)
    served = serve("--model-dir", "m")
    Path("m/cats/2").write_text("text")
    look_twice(served)
    assert [row["state"] for row in served.index()] == ["READY", "UNAVAILABLE"]
    Path("m/cats/2").unlink()
    served.look()
    assert served.index() == [{"name": "cats", "version": "1", "state": "READY", "reason": ""}]
    assert not served.seen
    Path("m/cats/1").rename("good")
    Path("m/cats/1").write_text("text")
    with pytest.raises(StartupError, match="but a text file"):
        served.load("cats")
    Path("m/cats/1").unlink()
    Path("good").rename("m/cats/1")
    served.load("cats")
    assert factor(served, "cats") == 1


@pytest.mark.parametrize("unloads", [False, True])
def test_of_a_model_that_is_gone_no_refused_version_is_left(serve: Serve, unloads: bool) -> None:
    times(Path("m/cats/1/model.xml"), 1)
    times(Path("m/dogs.xml"), 2)
    served = serve("--model-dir", "m")
    Path("m/cats/2").mkdir()
    Path("m/cats/2/model.xml").write_text("text")
    look_twice(served)
    assert [(row["version"], row["state"]) for row in served.index() if row["name"] == "cats"] == [
        ("1", "READY"),
        ("2", "UNAVAILABLE"),
    ]
    if unloads:
        served.unload("cats")
    else:
        shutil.rmtree("m/cats")
        look_twice(served)
    left = [row for row in served.index() if row["name"] == "cats"]
    assert left == ([{"name": "cats", "state": "UNAVAILABLE", "reason": "unloaded"}] if unloads else [])


def test_loading_one_with_broken_settings_fails(serve: Serve) -> None:
    """Though the old one is served: it is not what was asked for."""
    times(Path("m/cats.xml"), 1)
    served = serve("--model-dir", "m")
    Path("m/cats.toml").write_text("crop = ")
    with pytest.raises(StartupError, match=re.escape("cats.toml is no TOML")):
        served.load("cats")
    Path("m/cats.toml").write_text("x = " + 100_000 * "[")
    with pytest.raises(StartupError, match=re.escape("cats.toml is no TOML")):
        served.load("cats")
    assert factor(served, "cats") == 1
    Path("m/cats.toml").unlink()
    served.load("cats")


def test_a_folder_that_nobody_may_read_is_passed_over(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lost+found on a disk of its own; one that could be read before goes on."""
    times(Path("m/cats/1/model.xml"), 1)
    times(Path("m/dogs/1/model.xml"), 2)
    Path("m/lost+found").mkdir()
    closed, listdir = ["lost+found"], os.listdir

    def list_some(path: Any) -> list[str]:
        if Path(path).name in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", list_some)
    served = serve("--model-dir", "m")
    assert served.names() == ("cats", "dogs")
    assert served.problem(30) == ""
    closed.append("dogs")
    look_twice(served)
    assert factor(served, "dogs") == 2
    with pytest.raises(StartupError, match=re.escape("m/dogs cannot be read (Permission denied).")):
        served.load("dogs")


def test_one_that_was_loaded_for_nothing_leaves_the_metrics_alone(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    times(Path("m/cats.xml"), 1)
    served = serve("--model-dir", "m")
    real = repositories.serve_source

    def changing(*arguments: Any) -> Served:
        made = real(*arguments)
        times(Path("m/cats.xml"), 3)
        return made

    monkeypatch.setattr(repositories, "serve_source", changing)
    times(Path("m/cats.xml"), 2)
    look_twice(served)
    served.find("cats").batcher.waiting = 7
    name, labels = "keras_server_queue_length", {"model": "cats", "version": "1"}
    assert telemetry.METRICS.get_sample_value(name, labels) == 7
    served.find("cats").batcher.waiting = 0


def test_who_asks_for_a_load_waits_no_longer_than_its_request(serve: Serve) -> None:
    """And not in the way of the process's end, as the threads of requests are."""
    times(Path("m/cats.xml"), 1)
    served = serve("--model-dir", "m")
    times(Path("m/cats.xml"), 2)
    TICKET.set(Ticket(0.2))
    try:
        with served.loading, pytest.raises(Overdue):
            served.load("cats")
    finally:
        TICKET.set(None)
    wait_until(lambda: factor(served, "cats") == 2)


def test_what_is_being_loaded_is_finished_before_the_end(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else begun: Python ends badly in the midst of native code."""
    times(Path("m/cats.xml"), 1)
    served = serve("--model-dir", "m")
    real, begun, go_on = repositories.serve_source, list[str](), threading.Event()

    def slowly(*arguments: Any) -> Served:
        begun.append(arguments[2])
        go_on.wait(20)
        return real(*arguments)

    monkeypatch.setattr(repositories, "serve_source", slowly)
    for name in ("a", "b"):
        times(Path(f"m/{name}.xml"), 2)
    served.look()
    served.look_soon()
    wait_until(lambda: begun)
    monkeypatch.setattr(repositories, "LAST_SECONDS", 0.1)
    served.end()
    assert served.thread.is_alive(), "what is stuck is not waited for"
    monkeypatch.setattr(repositories, "LAST_SECONDS", 20)
    threading.Timer(0.2, go_on.set).start()
    served.end()
    assert not served.thread.is_alive()
    assert begun == ["a"]
    assert factor(served, "a") == 2
