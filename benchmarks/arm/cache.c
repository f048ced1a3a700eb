/* qemu plugin: misses of simulated data caches between the markers HINT #64 and HINT #65. Caches of lines of 64 bytes, the
 * least recently used line leaves, writes allocate, no prefetcher; level 2 holds data alone and is asked on a miss
 * of level 1. What runs before a region warms them. Each region becomes a line
 * "ACCESSES MISSES_OF_LEVEL_1 MISSES_OF_LEVEL_2"; an access that spans two lines counts as two.
 *   qemu-aarch64 -plugin libcache.so,out=FILE,l1=65536/4,l2=1048576/8 PROGRAM          bytes / ways
 * One thread. Debian's package has no qemu-plugin.h: what is used of version 1 of the interface is declared here. */
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
typedef uint64_t qemu_plugin_id_t;
typedef uint32_t qemu_plugin_meminfo_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_info_t;
enum { CB_NO_REGS = 0, MEM_RW = 3 };
typedef void (*tb_trans_cb)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*vcpu_udata_cb)(unsigned, void *);
typedef void (*vcpu_mem_cb)(unsigned, qemu_plugin_meminfo_t, uint64_t, void *);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, tb_trans_cb);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, vcpu_udata_cb, int flags, void *);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *, vcpu_mem_cb, int flags, int rw, void *);
unsigned qemu_plugin_mem_size_shift(qemu_plugin_meminfo_t);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

EXPORT int qemu_plugin_version = 1;

enum { BEGIN = 0xd503281f, END = 0xd503283f, LINE = 6 };

struct cache {
  uint64_t sets, ways, misses;
  uint64_t *lines; /* [sets][ways], most recently used first; 0: empty */
};
static struct cache l1, l2;
static uint64_t accesses;
static const char *path = "cache.txt";
static FILE *file;

static struct cache make(uint64_t bytes, uint64_t ways) {
  struct cache c = {ways ? (bytes >> LINE) / ways : 0, ways, 0, NULL};
  if (c.sets == 0 || (c.sets & (c.sets - 1)) != 0 || (c.lines = calloc(c.sets * ways, sizeof *c.lines)) == NULL) abort();
  return c;
}

static bool hits(struct cache *c, uint64_t line) {
  uint64_t *set = c->lines + (line & (c->sets - 1)) * c->ways, i = 0;
  while (i + 1 < c->ways && set[i] != line) ++i;
  const bool found = set[i] == line;
  for (; i > 0; --i) set[i] = set[i - 1];
  set[0] = line;
  c->misses += !found;
  return found;
}

static void on_access(unsigned cpu, qemu_plugin_meminfo_t info, uint64_t address, void *data) {
  (void)cpu, (void)data;
  const uint64_t last = (address + (1u << qemu_plugin_mem_size_shift(info)) - 1) >> LINE;
  for (uint64_t line = address >> LINE; line <= last; ++line) {
    ++accesses;
    if (!hits(&l1, line)) hits(&l2, line);
  }
}

static void at_begin(unsigned cpu, void *data) {
  (void)cpu, (void)data;
  accesses = l1.misses = l2.misses = 0;
}

static void at_end(unsigned cpu, void *data) {
  (void)cpu, (void)data;
  if (file == NULL) file = fopen(path, "w");
  if (file == NULL) abort();
  fprintf(file, "%" PRIu64 " %" PRIu64 " %" PRIu64 "\n", accesses, l1.misses, l2.misses);
  fflush(file);
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
  (void)id;
  for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); ++i) {
    struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(insn), 4);
    if (word == (uint32_t)BEGIN) qemu_plugin_register_vcpu_insn_exec_cb(insn, at_begin, CB_NO_REGS, NULL);
    if (word == (uint32_t)END) qemu_plugin_register_vcpu_insn_exec_cb(insn, at_end, CB_NO_REGS, NULL);
    qemu_plugin_register_vcpu_mem_cb(insn, on_access, CB_NO_REGS, MEM_RW, NULL);
  }
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info_t *info, int argc, char **argv) {
  (void)info;
  uint64_t bytes[2] = {65536, 1048576}, ways[2] = {4, 8};
  for (int i = 0; i < argc; ++i) {
    if (strncmp(argv[i], "out=", 4) == 0) path = strdup(argv[i] + 4);
    const int level = strncmp(argv[i], "l1=", 3) == 0 ? 0 : strncmp(argv[i], "l2=", 3) == 0 ? 1 : 2;
    if (level < 2 && sscanf(argv[i] + 3, "%" SCNu64 "/%" SCNu64, &bytes[level], &ways[level]) != 2) return 1;
  }
  l1 = make(bytes[0], ways[0]), l2 = make(bytes[1], ways[1]);
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
  return 0;
}
