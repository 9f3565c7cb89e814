"""Threads of the CPU kernels: how they meet, whose they are, how many, and what PyTorch computes on one alone."""

import contextlib
import os
import platform
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastprior.cli import info
from fastprior.kernels import ops
from fastprior.kernels.arguments import LinearArgs
from fastprior.kernels.cpu import blocks as cpu_blocks
from fastprior.kernels.cpu import library as cpu_library
from fastprior.kernels.cpu import linear as cpu_linear
from helpers import ROOT
from helpers.at_once import at_once
from helpers.cpu_cases import NEEDS_KERNELS, OPTIONS, block_arguments, child, make, threads
from helpers.priors import make_prior, make_text

pytestmark = NEEDS_KERNELS
MANY = min(81, cpu_library.most_rows(torch.float32))  # rows of a linear


@contextlib.contextmanager
def crowded(yes=True):
    """As if another process had taken a core a moment ago, or never."""
    cpu_library.library().set_crowded(int(yes))
    try:
        yield
    finally:
        cpu_library.library().set_crowded(0)


# teams, in a program of C


TEAM = r"""
#include "team.h"
#include <stdio.h>
enum { ROUNDS = 300, MOST = 8 };
static long seen[MOST], wrong, works;
static void pass(const void *argument, const struct member *me) {
    for (long round = 1; round <= ROUNDS; round++) {
        seen[me->thread] = round; /* not atomic: what is seen after a meeting is what was written before */
        meet(me);
        for (long i = 0; i < me->threads; i++) if (seen[i] != round) wrong = 1;
        meet(me);
    }
    if (!me->thread) works++;
}
static void *several(void *argument) {
    for (int i = 0; i < 50; i++) in_team(argument, NULL, 2 + i % 3);
    return NULL;
}
static void little(const void *argument, const struct member *me) { meet(me); }
static void late(const void *argument, const struct member *me) {
    if (me->thread) nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    meet(me);
}
static long own;
static void look(const void *argument, const struct member *me) { if (!me->thread) own = me->team->asked; }
static long turns(void) { /* of this thread on a shared core, in ns */
    uint64_t found[6] = {0}; /* size, policy; flags; nice, priority; runtime; … */
    syscall(SYS_sched_getattr, 0, found, sizeof found, 0);
    return found[3];
}
int main(void) {
    const long before = turns();
    set_crowded(SHARED);
    for (long threads = 1; threads <= MOST; threads++) in_team(pass, NULL, threads);
    if (turns() != before) return puts("a caller kept the turns of a team"), 1;
    if (wrong || works != MOST) return printf("wrong %ld, works %ld\n", wrong, works), 1;
    if (SHARED) { /* calls from several threads at once; a sanitizer knows nothing of OpenMP's */
        pthread_t callers[4];
        for (int i = 0; i < 4; i++) pthread_create(callers + i, NULL, several, little);
        for (int i = 0; i < 4; i++) pthread_join(callers[i], NULL);
        long teams = 0;
        for (struct team *team = free_teams; team; team = team->next) teams++;
        if (!teams || teams > 4) return printf("%ld teams for 4 callers\n", teams), 1;
    } else {
        set_crowded(0); /* which it may have been */
        in_team(look, NULL, 2);
        if (own) return puts("threads of our own for no reason"), 1;
        in_team(late, NULL, 2);
        in_team(look, NULL, 2);
        if (own != 2) return puts("a long wait was not noticed"), 1;
        if (crowded_until > nanoseconds() + REMEMBER_NS) return puts("a long wait is never forgotten"), 1;
        atomic_store(&crowded_until, nanoseconds());
        in_team(look, NULL, 2);
        if (own) return puts("a long wait was not forgotten"), 1;
    }
    puts("met");
    return 0;
}
"""


def compiled(folder, *flags) -> list[str]:
    """The command that runs the program; skips where the compiler does not have what the flags ask for."""
    (folder / "team.c").write_text(TEAM)
    command = ["cc", "-O2", "-fopenmp", *flags, f"-I{cpu_library.SOURCES}", "team.c", "-o", "team"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode and "sanitize" in " ".join(flags):
        pytest.skip(f"the compiler has no such sanitizer: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    # a sanitizer needs its addresses where a system that shuffles them may not leave them
    return [
        *(["setarch", platform.machine(), "-R"] if flags[-1].startswith("-fsanitize") else []),
        str(folder / "team"),
    ]


@pytest.mark.parametrize("look_ns", [0, 50000], ids=["always asleep", "looking first"])
@pytest.mark.parametrize("shared", [0, 1], ids=["openmp", "own"])
def test_members_see_what_others_wrote_before_a_meeting(tmp_path, shared, look_ns):
    flags = f"-DSHARED={shared}", f"-DLOOK_NS={look_ns}", "-DREMEMBER_NS=60000000000"
    done = subprocess.run(compiled(tmp_path, *flags), capture_output=True, text=True, timeout=60)
    assert done.stdout == "met\n", done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("look_ns", [0, 50000], ids=["always asleep", "looking first"])
def test_no_race_in_teams(tmp_path, look_ns):
    command = compiled(tmp_path, "-DSHARED=1", f"-DLOOK_NS={look_ns}", "-g", "-fsanitize=thread")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("met\n", "")


@pytest.mark.slow
def test_the_sanitizer_sees_a_race(tmp_path):
    """What the test before shows is worth something: without meetings there is one."""
    source = (cpu_library.SOURCES / "team.h").read_text() + "\n#define meet(me) ((void)(me))\n"
    (tmp_path / "without_meetings.h").write_text(source)
    (tmp_path / "team.c").write_text(TEAM.replace("team.h", "without_meetings.h"))
    command = ["cc", "-O2", "-g", "-fopenmp", "-DSHARED=1", "-I.", "-fsanitize=thread", "team.c", "-o", "team"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("the compiler has no such sanitizer")
    run = ["setarch", platform.machine(), "-R", str(tmp_path / "team")]
    assert "data race" in subprocess.run(run, capture_output=True, text=True, timeout=120).stderr


def test_a_system_that_gives_fewer_threads(tmp_path):
    """A limit of a container, say: the work is done by those that there are."""
    (tmp_path / "few.c").write_text(r"""
#include <pthread.h>
static int left = 2;
static int create(pthread_t *id, const pthread_attr_t *attributes, void *(*start)(void *), void *argument) {
    return left-- > 0 ? pthread_create(id, attributes, start, argument) : 11;
}
#define pthread_create create
#include "team.h"
#include <stdio.h>
static atomic_long parts;
static void work(const void *argument, const struct member *me) {
    atomic_fetch_add(&parts, 100 / me->threads);
    meet(me);
}
int main(void) {
    set_crowded(1);
    for (int i = 0; i < 3; i++) in_team(work, NULL, 5);
    in_team(work, NULL, 4); /* and none at all */
    printf("%ld\n", (long)parts);
}
""")
    include = f"-I{cpu_library.SOURCES}"
    subprocess.run(["cc", "-fopenmp", include, "few.c", "-o", "few"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "few"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{3 * 99 + 100}\n"


# teams of the kernels


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_whose_threads_they_are_changes_no_bit(count):
    given, prior, text = block_arguments(), make_prior(), make_text(3, 32)

    def results():
        torch.manual_seed(0)
        linears = [
            cpu_linear.linear(LinearArgs(**make(rows, 97, 300, kind, OPTIONS["all-swiglu"])))
            for rows in (2, 9, MANY)
            for kind in ("fp32", "bf16", "int8")
        ]
        sampled = prior.sample(**text, timesteps=9, num_samples_per_batch=2, progress=False)
        return [*(t for pair in linears for t in pair), cpu_blocks.run_blocks(**given), sampled]

    with threads(1):
        alone = results()
    with threads(count):
        for yes in (False, True):
            with crowded(yes):
                for got, wanted in zip(results(), alone):
                    assert torch.equal(got, wanted)


def test_threads_of_a_program_call_teams_of_our_own_at_once():
    cases = [make(rows, 97, 300, "fp32", OPTIONS["all-swiglu"]) for rows in (2, 9, 3, MANY)]
    expected, wrong = [cpu_linear.linear(LinearArgs(**inputs)) for inputs in cases], []

    def work(index):
        torch.set_num_threads(1 + index % 3)
        for _ in range(50):
            wrong.extend(
                index
                for got, wanted in zip(cpu_linear.linear(LinearArgs(**cases[index])), expected[index])
                if not torch.equal(got, wanted)
            )

    with threads(1), crowded():
        at_once(work, range(len(cases)))
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_makes_teams_of_its_own():
    inputs = make(3, 97, 300)
    with threads(3), crowded():
        expected = cpu_linear.linear(LinearArgs(**inputs))

        def work():
            right = torch.equal(cpu_linear.linear(LinearArgs(**inputs)), expected)
            sys.exit(
                not (
                    right
                    and child(lambda: sys.exit(not torch.equal(cpu_linear.linear(LinearArgs(**inputs)), expected))) == 0
                )
            )

        assert child(work) == 0
        assert torch.equal(cpu_linear.linear(LinearArgs(**inputs)), expected)


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("yes", [False, True], ids=["openmp", "own"])
def test_a_forked_child_samples(yes):
    """PyTorch's own threads, too, must not be waited for."""
    prior, text = make_prior(), make_text(3, 32)
    large = torch.randn(400, 400)

    def work():
        torch.manual_seed(0)
        (large + large).sum()
        return prior.sample(**text, timesteps=9, progress=False)

    with threads(2), crowded(yes):
        expected = work()
        assert child(lambda: sys.exit(not torch.equal(work(), expected))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(prefix=4000, suffix=3), dict(prefix=9, suffix=256)], ids=["keys", "suffix"])
@pytest.mark.parametrize("count", [1, 2])
def test_threads_with_little_stack(sizes, count):
    """Attention of the most that is taken, in a process of its own: beyond a stack, OpenMP's too, it ends."""
    code = f"""
import threading, torch
from helpers.cpu_cases import make_decode, threads
from fastprior.kernels.cpu import attention
given = make_decode(rows=2, dim_head=256, heads=1, seq=2, **{sizes})
expected, same = attention.decode_attention(**given), []
threading.stack_size(65536)
with threads({count}):
    thread = threading.Thread(target=lambda: same.append(torch.equal(attention.decode_attention(**given), expected)))
    thread.start()
    thread.join()
print(*same)
"""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = os.environ | dict(PYTHONPATH=paths, OMP_STACKSIZE="64k")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "True\n", done.stderr[-2000:]


@pytest.mark.slow
def test_a_program_ends_while_its_threads_are_within_calls():
    """Daemon threads in calls of C alone: neither waited for, nor do they read what is gone by then."""
    code = """
import threading, time, torch
from fastprior.kernels.cpu import library as cpu_library, structs
library, size = cpu_library.library(), 512
x, weight = torch.randn(8, size), torch.randn(size, size)

def work(number):
    out = torch.empty(8, size)
    call = structs.Linear(
        x=x.data_ptr(), x_stride=size, out=out.data_ptr(), out_stride=size, weight=weight.data_ptr(),
        weight_stride=size, columns=size, rows=8, dim=size, eps=1e-5,
    )
    kept = x, weight
    while True:
        library.set_crowded(number)
        library.linear(call, 2)

for number in range(3):
    threading.Thread(target=work, args=(number > 1,), daemon=True).start()
time.sleep(0.1)
print("leaving", flush=True)
"""
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


# how many


def limited(monkeypatch, tmp_path, groups: str, files: dict[str, str]):
    (tmp_path / "groups").write_text(groups)
    for name, content in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(content)
    monkeypatch.setattr(cpu_library, "CONTROL_GROUPS", tmp_path / "fs")
    monkeypatch.setattr(cpu_library, "OF_PROCESS", tmp_path / "groups")
    cpu_library.quota.cache_clear()


V1 = "3:cpuset:/\n1:cpu,cpuacct:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    "groups, files, cores, count",
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2, 2),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "400000", "cpu/docker/abc/cpu.cfs_period_us": "100000"}, 4, 4),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "-1", "cpu/docker/abc/cpu.cfs_period_us": "100000"}, None, 8),
        (V1, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2, 2),  # seen from a container
        ("0::/\n", {"cpu.max": "garbage"}, None, 8),
        ("0::/../..\n", {"cpu.max": "200000 100000"}, 2, 2),  # a group outside of what this namespace sees
        ("", {}, None, 8),
    ],
)
def test_no_more_threads_than_a_control_group_pays_for(monkeypatch, tmp_path, groups, files, cores, count):
    limited(monkeypatch, tmp_path, groups, files)
    try:
        with threads(8):  # which gives as many cores
            assert cpu_library.quota() == cores
            assert cpu_library.thread_count() == count
            said = dict(info._fast_paths())["CPU kernels"]
            assert f"threads: {count}" in said and (cores is None) != (f"pays for {cores} cores" in said)
    finally:
        cpu_library.quota.cache_clear()


@pytest.mark.slow
def test_no_more_threads_than_cores():
    code = """
import os, torch
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(4)
from fastprior.kernels.cpu import library as cpu_library
print(cpu_library.thread_count())
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity")
@pytest.mark.parametrize("yes", [False, True], ids=["openmp", "own"])
def test_cores_that_come_and_go_during_calls(yes):
    cores, inputs, stop = os.sched_getaffinity(0), make(9, 97, 300), threading.Event()
    if len(cores) == 1 or (cpu_library.quota() or 2) <= 1:
        pytest.skip("one core")
    expected, counts, wrong, moves = cpu_linear.linear(LinearArgs(**inputs)), set(), 0, []

    def move_to(some):
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # which has ended
                os.sched_setaffinity(int(task), some)

    def move():
        while not stop.wait(0.002):
            move_to({min(cores)})
            stop.wait(0.002)
            move_to(cores)
            moves.append(cores)

    before, mover = torch.get_num_threads(), threading.Thread(target=move)
    torch.set_num_threads(2)
    try:
        with crowded(yes):
            mover.start()
            end = time.monotonic() + 20
            while time.monotonic() < end and (len(moves) < 20 or len(counts) == 1):
                counts.add(cpu_library.thread_count())
                wrong += not torch.equal(cpu_linear.linear(LinearArgs(**inputs)), expected)
    finally:
        stop.set()
        mover.join()
        move_to(cores)
        torch.set_num_threads(before)
    assert not wrong and len(moves) >= 20
    assert counts == {1, 2}


# what is little


def test_little_is_computed_by_one_thread_and_kernels_by_all():
    little, large = torch.zeros(cpu_library.LITTLE), torch.zeros(cpu_library.LITTLE + 1)
    with threads(2):
        with cpu_library.one_thread(little):
            assert torch.get_num_threads() == 1 and cpu_library.thread_count() == 2
            with cpu_library.one_thread(little):
                assert torch.get_num_threads() == 1 and cpu_library.thread_count() == 2
            assert torch.get_num_threads() == 1 and cpu_library.thread_count() == 2
        assert torch.get_num_threads() == 2 and cpu_library.thread_count() == 2
        with cpu_library.one_thread(large):
            assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), cpu_library.one_thread(little):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2 and cpu_library.thread_count() == 2


def test_a_thread_that_begins_meanwhile_has_all_threads():
    """PyTorch reads how many, once, as a thread first computes."""
    found, little = [], torch.zeros(3)

    def begin():
        little.sum()
        found.append((torch.get_num_threads(), cpu_library.thread_count()))

    with threads(2):
        with cpu_library.one_thread(little):
            thread = threading.Thread(target=begin)
            thread.start()
            thread.join()
            assert torch.get_num_threads() == 1
    assert found == [(2, 2)]


class Threads(TorchDispatchMode):
    """Numbers of threads that operations on many numbers have; PyTorch shares out those of over 32,768."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        sizes = [t.numel() for t in (*args, result) if torch.is_tensor(t)]
        if max(sizes, default=0) > 32768 and not operation.is_view:
            self.found.append((torch.get_num_threads(), str(operation)))
        return result


@pytest.mark.slow
@pytest.mark.parametrize("how", ["drop-in", "sampler"])
def test_a_run_of_one_prompt_waits_for_no_thread_of_pytorch(monkeypatch, how):
    from fastprior import PriorSampler

    monkeypatch.setattr(cpu_library, "is_watched", lambda: False)  # the mode below would keep kernels away
    length = min(77, MANY - 4)  # more tokens than C takes are PyTorch's, on all threads
    prior = make_prior(dict(dim=1536, dim_head=64, heads=8, max_text_len=length, num_timesteps=20))
    text = make_text(1, 1536, length)
    with threads(2):
        sampler = PriorSampler(prior, batch_sizes=(1,), timesteps=9) if how == "sampler" else None

        def run():
            if sampler is None:
                return prior.p_sample_loop((1, 1536), text, timesteps=9, progress=False)
            return sampler(**text)

        run()
        with Threads() as seen:
            run()
    assert seen.found and {count for count, _ in seen.found} == {1}, [found for found in seen.found if found[0] > 1]
    assert torch.isfinite(run()).all() and ops.forced() is None
