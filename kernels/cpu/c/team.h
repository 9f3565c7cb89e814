/* Teams of threads that compute one thing together, and meet between its phases.

   A thread that waits for the others looks for a short while, since most phases take microseconds, and then sleeps until
   it is woken: what it waits for may be a thread whose core another process has at the moment, and to look on would take
   time from it, and from the next phases. OpenMP's threads look for milliseconds, unless an environment variable says
   otherwise. They compute here all the same while the cores are free, for they are PyTorch's threads, which then do not
   look for work of PyTorch's at the same time. Once a thread was waited for as long as only another process takes a core,
   threads of our own compute, which no one else keeps awake. */

#pragma once
#include <limits.h>
#include <omp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifndef LOOK_NS
#define LOOK_NS 50000 /* how long a thread looks before it sleeps */
#endif
#ifndef REMEMBER_NS
#define REMEMBER_NS 1000000000 /* how long threads of our own compute after a wait of more than LONG_NS */
#endif
#ifndef TURN_NS
#define TURN_NS 30000000 /* how long a member of a team of our own wants a shared core in one piece */
#endif
enum { LONG_NS = 1000000, LOOKS = 16 /* between readings of the clock */ };
enum { STACK = 8 << 20 /* bytes, taken as they are used */, APART = 128 /* bytes: two lines of a cache */ };

/* A number that threads wait to see changed. */
struct gate {
    _Alignas(APART) atomic_uint number;
    atomic_uint sleepers;
};

/* A thread of a team. */
struct member {
    struct team *team;
    long thread, threads;
    pthread_t id; /* of our own */
};

typedef void part_of_work(const void *, const struct member *);

struct team {
    struct gate meeting, call; /* how often all have met; how often our own threads were called */
    _Alignas(APART) atomic_uint arrived;
    part_of_work *work; /* NULL: go home */
    const void *argument;
    long asked, threads; /* how many were asked for, and how many the system gave */
    struct team *next;
    struct member members[];
};

static atomic_long crowded_until; /* of `nanoseconds` */

static long nanoseconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000L + time.tv_nsec;
}

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* Wait until the number is not `seen` any more; for how many ns, 0 without sleep. Who sleeps says so before it reads the
   number, and who changes the number reads afterwards who sleeps: one of them notices the other. */
static long wait_for_change(struct gate *gate, unsigned seen) {
    long start = 0, time = 0;
    while (time - start <= LOOK_NS) {
        for (int look = 0; look < LOOKS; look++) {
            if (atomic_load_explicit(&gate->number, memory_order_acquire) != seen) return 0;
            pause_briefly();
        }
        time = nanoseconds();
        if (!start) start = time;
    }
    atomic_fetch_add(&gate->sleepers, 1);
    while (atomic_load(&gate->number) == seen) {
#ifdef __linux__
        syscall(SYS_futex, &gate->number, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
#else
        nanosleep(&(struct timespec){.tv_nsec = LOOK_NS}, NULL);
#endif
    }
    atomic_fetch_sub(&gate->sleepers, 1);
    return nanoseconds() - start;
}

static void change(struct gate *gate) {
    atomic_fetch_add(&gate->number, 1);
#ifdef __linux__
    if (atomic_load(&gate->sleepers)) syscall(SYS_futex, &gate->number, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#endif
}

/* Every member waits here for the last, and sees then what each wrote before. */
static void meet(const struct member *me) {
    struct team *team = me->team;
    if (me->threads == 1) return;
    const unsigned seen = atomic_load_explicit(&team->meeting.number, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 == me->threads) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        change(&team->meeting);
    } else if (wait_for_change(&team->meeting, seen) > LONG_NS) {
        const long until = nanoseconds() + REMEMBER_NS;
        if (until > atomic_load_explicit(&crowded_until, memory_order_relaxed))
            atomic_store_explicit(&crowded_until, until, memory_order_relaxed);
    }
}

/* The first of `all` things that are a member's, and the first that is not any more. */
static inline long begin_of(const struct member *me, long all) { return all * me->thread / me->threads; }
static inline long end_of(const struct member *me, long all) { return all * (me->thread + 1) / me->threads; }

/* Have turns of so many ns on a core that is shared, of which there are fewer then; returns how long they were, 0 where
   that cannot be had. Who waits for another's turn sleeps, and begins one with it: threads with long turns fall into
   step, and lose little between them. Linux has it since 6.12. */
static long take_turns(long ns) {
#ifdef __linux__
    struct { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t runtime, other[2]; } turns = {0};
    if (!ns || syscall(SYS_sched_getattr, 0, &turns, sizeof turns, 0) || turns.policy) return 0; /* not the usual way */
    const long before = turns.runtime;
    turns.runtime = ns;
    return syscall(SYS_sched_setattr, 0, &turns, 0) ? 0 : before;
#else
    return 0;
#endif
}

/* What a thread of our own does all its life. */
static void *serve(void *argument) {
    const struct member *me = argument;
    struct team *team = me->team;
    take_turns(TURN_NS);
    for (unsigned call = 0;; call++) {
        wait_for_change(&team->call, call);
        if (!team->work) return NULL;
        team->work(team->argument, me);
        meet(me);
    }
}

/* Teams of our own that no call has at the moment. A forked child has none of their threads. */
static struct team *free_teams;
static pthread_mutex_t teams_mutex = PTHREAD_MUTEX_INITIALIZER;
static void hold_teams(void) { pthread_mutex_lock(&teams_mutex); }
static void release_teams(void) { pthread_mutex_unlock(&teams_mutex); }
static void forget_teams(void) {
    free_teams = NULL;
    release_teams();
}
__attribute__((constructor)) static void prepare_for_forks(void) { pthread_atfork(hold_teams, release_teams, forget_teams); }

/* A team for so many threads; of fewer, where the system gives no more. NULL where there is no memory. */
static struct team *form_team(long threads) {
    const size_t bytes = (sizeof(struct team) + threads * sizeof(struct member) + APART - 1) / APART * APART;
    struct team *team = aligned_alloc(APART, bytes);
    if (!team) return NULL;
    memset(team, 0, bytes);
    team->asked = threads;
    sigset_t all, before; /* signals are for the program's own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    for (struct member *member = team->members; team->threads < threads; member++, team->threads++) {
        member->team = team, member->thread = team->threads;
        if (team->threads && pthread_create(&member->id, &attributes, serve, member)) break;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    for (long i = 0; i < team->threads; i++) team->members[i].threads = team->threads; /* which a call publishes */
    return team;
}

static void dismiss_team(struct team *team) {
    team->work = NULL;
    change(&team->call);
    for (long i = 1; i < team->threads; i++) pthread_join(team->members[i].id, NULL);
    free(team);
}

/* A free team for so many threads, or else a new one in place of one for another number. */
static struct team *take_team(long threads) {
    struct team **place = &free_teams, *team, *other = NULL;
    hold_teams();
    while (*place && (*place)->asked != threads) place = &(*place)->next;
    if ((team = *place)) *place = team->next;
    else if ((other = free_teams)) free_teams = other->next;
    release_teams();
    if (other) dismiss_team(other);
    return team ? team : form_team(threads);
}

static int in_own_team(part_of_work *work, const void *argument, long threads) {
    struct team *team = take_team(threads);
    if (!team) return 0;
    team->work = work, team->argument = argument;
    const long turns = take_turns(TURN_NS); /* this thread's, too, for as long as it is one of them */
    change(&team->call);
    work(argument, team->members);
    meet(team->members);
    take_turns(turns);
    hold_teams();
    team->next = free_teams, free_teams = team;
    release_teams();
    return 1;
}

/* Have each thread of a team do its part of some work, and wait until all have. */
static void in_team(part_of_work *work, const void *argument, long threads) {
    const int crowded = threads > 1 && nanoseconds() < atomic_load_explicit(&crowded_until, memory_order_relaxed);
    if (crowded && in_own_team(work, argument, threads)) return;
    struct team team;
    memset(&team, 0, sizeof team);
#pragma omp parallel num_threads(threads)
    {
        const struct member me = {.team = &team, .thread = omp_get_thread_num(), .threads = omp_get_num_threads()};
        work(argument, &me);
        meet(&me); /* OpenMP waits too, and not for long then */
    }
}

/* For tests: whether the next calls take threads of our own. */
void set_crowded(long crowded) { atomic_store(&crowded_until, crowded ? LONG_MAX : 0); }

/* For operations of PyTorch that this thread calls. torch.set_num_threads also says how many a thread has that begins
   meanwhile, for all its life. */
void set_threads(long threads) { omp_set_num_threads(threads); }
