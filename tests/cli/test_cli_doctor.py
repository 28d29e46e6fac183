from mpi_mlx_cli import main as cli
from mpi_mlx_cli.doctor import findings
from typer.testing import CliRunner

from mpi_mlx.runtime import BlasInfo, DeviceInfo


def machine(**changes):
    facts = dict(
        device="Device(cpu, 0)", name="x86_64", mlx="0.32.4", backend="CPU", memory_total=16 * 10**9,
        memory_available=12 * 10**9, cores=4, threads=2, compiler="/usr/bin/g++",
        blas=BlasInfo("/lib/libopenblas.so.0", "found"),
    )
    return DeviceInfo(**(facts | changes))


def advised(info, gflops=200.0, disk=10**11, platform="linux"):
    found = findings(info, gflops, disk, platform)
    return {name: advice for name, _, advice in found if advice is not None}


def test_nothing_to_mend(monkeypatch):
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    assert advised(machine()) == {}


def test_each_lack_has_its_remedy(monkeypatch):
    monkeypatch.setenv("PATH", "")
    note = "none found; pip install opencv-python, or apt install libopenblas0-pthread"
    lacks = advised(
        machine(blas=BlasInfo(None, note), compiler=None, memory_available=2 * 10**9), gflops=5.0, disk=10**9
    )
    assert set(lacks) == {"blas", "c++ compiler", "memory", "disk here"}
    assert "pip install opencv-python" in lacks["blas"] and "g++" in lacks["c++ compiler"]
    assert "busy" in advised(machine(), gflops=12.0)["fp32 speed"]


def test_a_mac_is_not_told_about_blas():
    blas = BlasInfo(None, "not needed here")
    info = machine(device="Device(gpu, 0)", backend="Metal", blas=blas, compiler=None)
    names = [name for name, *_ in findings(info, 3000.0, 10**11, "darwin")]
    assert "blas" not in names and advised(info, 3000.0, platform="darwin") == {}
    assert "Apple silicon" in advised(machine(blas=BlasInfo(None, "")), platform="darwin")["device"]


def test_the_command_measures_this_machine(monkeypatch):
    from mpi_mlx import runtime

    monkeypatch.setattr(runtime, "measure_gflops", lambda: 123.4)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "123 GFLOP/s" in result.output and "mlx" in result.output and "disk here" in result.output
