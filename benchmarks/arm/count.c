/* qemu plugin: how often each translated block ran between the markers HINT #64 and HINT #65, and its instruction words.
 * Each region becomes a line "region", then lines "COUNT ADDRESS WORD WORD ...", all but the count hexadecimal.
 *   qemu-aarch64 -plugin libcount.so,out=FILE PROGRAM
 * Debian's package has no qemu-plugin.h: what is used of version 1 of the interface is declared here. */
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_info_t;
enum { CB_NO_REGS = 0, INLINE_ADD_U64 = 0 };
typedef void (*tb_trans_cb)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*vcpu_udata_cb)(unsigned, void *);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, tb_trans_cb);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int op, void *p, uint64_t imm);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, vcpu_udata_cb, int flags, void *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

EXPORT int qemu_plugin_version = 1;

struct block {
  struct block *next;
  uint64_t count, address;
  size_t n;
  uint32_t words[];
};
static struct block *blocks;
static const char *path = "blocks.txt";
static FILE *file;

enum { BEGIN = 0xd503281f, END = 0xd503283f };

static void at_marker(unsigned cpu, void *end) {
  (void)cpu;
  if (end == NULL) {
    for (struct block *b = blocks; b; b = b->next) b->count = 0;
    return;
  }
  if (file == NULL) file = fopen(path, "w");
  if (file == NULL) abort();
  fputs("region\n", file);
  for (struct block *b = blocks; b; b = b->next) {
    if (b->count == 0) continue;
    fprintf(file, "%" PRIu64 " %" PRIx64, b->count, b->address);
    for (size_t i = 0; i < b->n; ++i) fprintf(file, " %08" PRIx32, b->words[i]);
    fputc('\n', file);
  }
  fflush(file);
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
  (void)id;
  const size_t n = qemu_plugin_tb_n_insns(tb);
  struct block *b = calloc(1, sizeof *b + n * sizeof(uint32_t));
  if (b == NULL) abort();
  b->n = n, b->address = qemu_plugin_tb_vaddr(tb), b->next = blocks, blocks = b;
  for (size_t i = 0; i < n; ++i) {
    struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
    memcpy(&b->words[i], qemu_plugin_insn_data(insn), 4);
    if (b->words[i] == (uint32_t)BEGIN || b->words[i] == (uint32_t)END)
      qemu_plugin_register_vcpu_insn_exec_cb(insn, at_marker, CB_NO_REGS, b->words[i] == (uint32_t)END ? b : NULL);
  }
  qemu_plugin_register_vcpu_tb_exec_inline(tb, INLINE_ADD_U64, &b->count, 1);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info_t *info, int argc, char **argv) {
  (void)info;
  for (int i = 0; i < argc; ++i) {
    if (strncmp(argv[i], "out=", 4) == 0) path = strdup(argv[i] + 4);
  }
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
  return 0;
}
