"""What `balancer.py` makes of Ray's configuration of HAProxy; that HAProxy takes it, the other tests show."""

import pytest
from ray.serve._private import controller, haproxy

from keras_server import balancer


def test_every_change_is_made() -> None:
    text = balancer.template()
    assert "option http-buffer-request" in text
    assert "errorfile" not in text
    assert "bind :" not in text
    assert "bind *:" not in text


def test_a_ray_with_other_lines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = haproxy.HAPROXY_CONFIG_TEMPLATE
    monkeypatch.setattr(haproxy, "HAPROXY_CONFIG_TEMPLATE", text.replace("retry-on {{", "retry_on {{"))
    with pytest.raises(RuntimeError, match="without the line 'retry-on"):
        balancer.install()


def test_a_ray_that_starts_it_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(controller, "HAProxyManager")
    with pytest.raises(RuntimeError, match="in another way"):
        balancer.install()


def test_the_controller_starts_the_changed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "HAProxyManager", controller.HAProxyManager)
    balancer.install()
    assert controller.HAProxyManager.__ray_metadata__.modified_class is balancer.Manager
