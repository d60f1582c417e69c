/*
 * icount: a QEMU plugin that counts executed instructions between markers.
 *
 * A marker is `movz xzr, #imm16` (0xd280001f | imm16 << 5): it changes nothing at any exception level, and no compiler
 * emits it. On x86-64 it is the eight-byte NOP 0f 1f 84 00 with the displacement 0x454e0000 | imm16: compilers pad with it, but
 * with the displacement 0 only. Whoever runs on the machine, guest or hypervisor, can say where an interval begins and ends:
 *
 *   0xa0ii   the intervals that follow belong to phase ii
 *   0xb000   an interval begins
 *   0xe000   it ends
 *   0xb1nn   a pause of nn members (1 to 16) begins
 *   0xc0ii   member ii is at work: each says so again and again
 *
 * An interval is every instruction of every exception level on every vCPU from the one behind 0xb000 up to the one
 * before 0xe000: for `marker; op; marker` that is `op` and all that it causes until its successor. The markers are not
 * in it. An instruction that faults and is executed again counts each time.
 *
 * A pause ends with 0xe000 too, some time after it is over. Member 0 executes 0xb1nn, asks for the pause with the next
 * instruction, and gives its first sign after some silence when it was answered. For each member the longest silence is
 * looked for that began before that sign; the result is what was executed from the first silence's begin to the last one's
 * end: from the moment in which the first member stopped to that in which all were at work again. What a CPU executes after
 * the answer for a member that is at work on it is not of the pause: with CPUs that take turns the others seem silent
 * meanwhile. It counts after all for a member that has to wait for that very CPU.
 *
 * Arguments: out=FILE (needed): the result, as JSON, written when QEMU ends: for each phase the number of intervals and
 * their min, median, p99 (nearest rank), max and mean. start=OPCODE: the instruction with this encoding, executed at a
 * page's first byte, also begins an interval, in phase 254; it and its like restart one that is open. A kernel's first
 * instruction can be told so without changing the kernel. The instruction itself is in that interval.
 *
 * Deterministic under `-icount`, where CPUs take turns; with several, an interval has what all of them executed. Then each
 * instruction calls back: QEMU 10.0's inline counting addresses the counters of CPUs but the first wrongly where it is
 * optimised.
 *
 * The few declarations of the plugin interface (version 4: QEMU 9.2 and newer) that are used stand here, because
 * distributions do not package its header.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

EXPORT int qemu_plugin_version = 4;

typedef uint64_t plugin_id;
struct qemu_info {
	const char *target_name;
	struct {
		int min, cur;
	} version;
	_Bool system_emulation;
	struct {
		int smp_vcpus, max_vcpus;
	} system;
};
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_scoreboard;
typedef struct {
	struct qemu_plugin_scoreboard *score;
	size_t offset;
} plugin_u64;
enum { CB_NO_REGS = 0 };
enum { INLINE_ADD_U64 = 0 };

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_atexit_cb(plugin_id, void (*)(plugin_id, void *), void *);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, void (*)(unsigned, void *), int, void *);
void qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(struct qemu_plugin_insn *, int, plugin_u64, uint64_t);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn *, void *, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
struct qemu_plugin_scoreboard *qemu_plugin_scoreboard_new(size_t);
uint64_t qemu_plugin_u64_sum(plugin_u64);

enum { PHASES = 256, BOOT_PHASE = 254, MEMBERS = 16, CPUS = 64, SOME_SILENCE = 4096 };

struct phase {
	uint64_t *samples;
	size_t count, room;
};

/* The longest silence of one who takes part in a pause, and the last time that it was heard. */
struct member {
	uint64_t last, begin, end;
};

static plugin_u64 inlined;
static uint64_t called_back;
static int several;
static struct member members[MEMBERS];
static unsigned paused;
/* When member 0 gave the sign that its question was answered, or 0. */
static uint64_t answered;
/* Whether a member is at work on a CPU since then, and what that CPU has executed since. */
static int working[CPUS];
static uint64_t worked[CPUS];
static struct phase phases[PHASES];
static unsigned phase;
static int open;
static uint64_t opened_at;
static uint32_t start_opcode;
static int x86;
static const char *out_path;

static uint64_t executed(void)
{
	return several ? called_back : qemu_plugin_u64_sum(inlined);
}

static void on_instruction(unsigned vcpu, void *argument)
{
	(void)argument;
	called_back++;
	if (vcpu < CPUS && working[vcpu])
		worked[vcpu]++;
}

static void die(const char *what)
{
	fprintf(stderr, "icount: %s\n", what);
	exit(1);
}

static void record(uint64_t instructions)
{
	struct phase *p = &phases[phase];

	if (p->count == p->room) {
		p->room = p->room ? 2 * p->room : 4096;
		p->samples = realloc(p->samples, p->room * sizeof(*p->samples));
		if (!p->samples)
			die("out of memory");
	}
	p->samples[p->count++] = instructions;
}

static void begin_pause(unsigned count, uint64_t now)
{
	paused = count;
	answered = 0;
	memset(working, 0, sizeof(working));
	memset(worked, 0, sizeof(worked));
	for (unsigned i = 0; i < count; i++)
		members[i] = (struct member){ now, now, now };
}

/* What all CPUs but vcpu have executed for members that are at work on them. */
static uint64_t worked_elsewhere(unsigned vcpu)
{
	uint64_t sum = 0;

	for (unsigned i = 0; i < CPUS; i++)
		if (i != vcpu)
			sum += worked[i];
	return sum;
}

static void hear(unsigned number, unsigned vcpu, uint64_t now)
{
	struct member *m = &members[number];

	if (number >= paused || vcpu >= CPUS)
		return;
	if (!number && !answered && now - m->last >= SOME_SILENCE)
		answered = now;
	if (!answered || m->last < answered) {
		uint64_t end = now - worked_elsewhere(vcpu);

		if (end - m->last > m->end - m->begin) {
			m->begin = m->last;
			m->end = end;
		}
	}
	working[vcpu] = answered != 0;
	m->last = now;
}

static uint64_t end_pause(void)
{
	uint64_t begin = members[0].begin, end = members[0].end;

	for (unsigned i = 1; i < paused; i++) {
		if (members[i].begin < begin)
			begin = members[i].begin;
		if (members[i].end > end)
			end = members[i].end;
	}
	paused = 0;
	return end - begin;
}

/* Callbacks run before the instruction is counted: the sum has everything before it. */
static void on_marker(unsigned vcpu, void *argument)
{
	unsigned imm = (unsigned)(uintptr_t)argument;

	switch (imm >> 8) {
	case 0xa0:
		phase = imm & 0xff;
		break;
	case 0xb0:
		opened_at = executed() + 1;
		open = 1;
		break;
	case 0xb1:
		if (imm & 0xff && (imm & 0xff) <= MEMBERS)
			begin_pause(imm & 0xff, executed() + 1);
		open = 1;
		break;
	case 0xc0:
		if ((imm & 0xff) < MEMBERS)
			hear(imm & 0xff, vcpu, executed());
		break;
	case 0xe0:
		if (open)
			record(paused ? end_pause() : executed() - opened_at);
		open = 0;
		break;
	}
}

static void on_start(unsigned vcpu, void *argument)
{
	(void)vcpu;
	(void)argument;
	phase = BOOT_PHASE;
	opened_at = executed();
	open = 1;
}

/* The number of a marker, or -1. */
static int marker_of(const struct qemu_plugin_insn *insn)
{
	uint8_t bytes[16];
	uint32_t words[2];
	size_t size = qemu_plugin_insn_data(insn, bytes, sizeof(bytes));

	if (size != (x86 ? 8 : 4))
		return -1;
	memcpy(words, bytes, size);
	if (x86)
		return words[0] == 0x00841f0f && words[1] >> 16 == 0x454e ? (int)(words[1] & 0xffff) : -1;
	return (words[0] & 0xffe0001f) == 0xd280001f ? (int)(words[0] >> 5 & 0xffff) : -1;
}

static void on_translation(plugin_id id, struct qemu_plugin_tb *block)
{
	size_t n = qemu_plugin_tb_n_insns(block);

	(void)id;
	for (size_t i = 0; i < n; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(block, i);
		uint32_t opcode = 0;
		int imm = marker_of(insn), kind = imm >> 8;

		if (imm >= 0 && (kind == 0xa0 || imm == 0xb000 || kind == 0xb1 || kind == 0xc0 || imm == 0xe000))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, on_marker, CB_NO_REGS, (void *)(uintptr_t)imm);
		if (start_opcode && qemu_plugin_insn_data(insn, &opcode, sizeof(opcode)) == sizeof(opcode) &&
		    opcode == start_opcode && !(qemu_plugin_insn_vaddr(insn) & 0xfff))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, on_start, CB_NO_REGS, NULL);
		if (several)
			qemu_plugin_register_vcpu_insn_exec_cb(insn, on_instruction, CB_NO_REGS, NULL);
		else
			qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(insn, INLINE_ADD_U64, inlined, 1);
	}
}

static int ascending(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static void print_phase(FILE *out, unsigned number, struct phase *p, const char *separator)
{
	double sum = 0;

	qsort(p->samples, p->count, sizeof(*p->samples), ascending);
	for (size_t i = 0; i < p->count; i++)
		sum += (double)p->samples[i];
	fprintf(out,
		"%s\"%u\":{\"count\":%zu,\"min\":%" PRIu64 ",\"median\":%" PRIu64 ",\"p99\":%" PRIu64 ",\"max\":%" PRIu64
		",\"mean\":%.2f}",
		separator, number, p->count, p->samples[0], p->samples[(p->count - 1) / 2],
		p->samples[(p->count * 99 + 99) / 100 - 1], p->samples[p->count - 1], sum / (double)p->count);
}

static void on_exit_of_qemu(plugin_id id, void *argument)
{
	const char *separator = "";
	FILE *out = fopen(out_path, "w");

	(void)id;
	(void)argument;
	if (!out)
		die("cannot write out=");
	fprintf(out, "{\"executed\":%" PRIu64 ",\"open\":%s,\"phases\":{", executed(),
		open ? "true" : "false");
	for (unsigned i = 0; i < PHASES; i++)
		if (phases[i].count) {
			print_phase(out, i, &phases[i], separator);
			separator = ",";
		}
	fprintf(out, "}}\n");
	if (fclose(out))
		die("cannot write out=");
}

EXPORT int qemu_plugin_install(plugin_id id, const struct qemu_info *info, int argc, char **argv)
{
	x86 = !strcmp(info->target_name, "x86_64");
	several = info->system_emulation && info->system.smp_vcpus > 1;
	for (int i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "out=", 4))
			out_path = strdup(argv[i] + 4);
		else if (!strncmp(argv[i], "start=", 6))
			start_opcode = (uint32_t)strtoul(argv[i] + 6, NULL, 0);
		else {
			fprintf(stderr, "icount: unknown argument %s\n", argv[i]);
			return 1;
		}
	}
	if (!out_path) {
		fprintf(stderr, "icount: out=FILE is needed\n");
		return 1;
	}
	inlined.score = qemu_plugin_scoreboard_new(sizeof(uint64_t));
	inlined.offset = 0;
	qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
	qemu_plugin_register_atexit_cb(id, on_exit_of_qemu, NULL);
	return 0;
}
