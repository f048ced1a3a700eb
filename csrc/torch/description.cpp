#include "torch/description.h"

#include <charconv>

namespace mnv4 {
namespace {

int number(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size())
    refuse("expected a whole number, got '" + std::string(text) + "'");
  return value;
}

/// Takes what comes before `mark` off the front; all of it where there is none.
std::string_view take(std::string_view& text, char mark) {
  const std::size_t at = text.find(mark);
  const std::string_view front = text.substr(0, at);
  text = at == std::string_view::npos ? std::string_view() : text.substr(at + 1);
  return front;
}

struct Field {
  std::string_view name;
  int* number = nullptr;
  bool* flag = nullptr;
  Act* act = nullptr;
};

void set(const Field& f, int value) {
  if (f.number != nullptr) {
    *f.number = value;
    return;
  }
  const int most = f.flag != nullptr ? 1 : static_cast<int>(Act::gelu);
  if (value < 0 || value > most)
    refuse("expected " + std::string(f.name) + " from 0 to " + std::to_string(most) + ", got " + std::to_string(value));
  if (f.flag != nullptr) {
    *f.flag = value == 1;
  } else {
    *f.act = static_cast<Act>(value);
  }
}

/// Sets the fields of a line and returns its stages.
std::vector<StageSource> read(std::string_view line, const std::vector<Field>& fields, std::size_t tensors,
                              std::size_t eps) {
  std::vector<StageSource> stages;
  while (!line.empty()) {
    std::string_view value = take(line, ' ');
    const std::string_view name = take(value, '=');
    if (name == "stage") {
      StageSource s;
      s.stage = number(take(value, ','));
      for (int& index : s.tensors) {
        index = number(take(value, ','));
        if (index < -1 || index >= static_cast<int>(tensors))
          refuse("expected indices below the " + std::to_string(tensors) + " params, got " + std::to_string(index));
      }
      s.eps = number(take(value, ','));
      if (s.eps < 0 || s.eps >= static_cast<int>(eps))
        refuse("expected an index below the " + std::to_string(eps) + " numbers of eps, got " + std::to_string(s.eps));
      if (!value.empty()) refuse("expected 9 numbers for a stage, got also '" + std::string(value) + "'");
      stages.push_back(s);
      continue;
    }
    const Field* found = nullptr;
    for (const Field& f : fields) {
      if (f.name == name) found = &f;
    }
    if (found == nullptr) refuse("expected the name of a field, got '" + std::string(name) + "'");
    set(*found, number(value));
  }
  return stages;
}

void require_valid(const std::string& wrong) {
  if (!wrong.empty()) refuse(wrong);
}

/// Elements that the tensors of a stage must have; false where the operation has no such stage.
bool measure(const Block& b, StageSource& s) {
  const BlockDesc& d = b.desc();
  if (s.stage < 0 || s.stage >= kStages || !b.has(static_cast<Stage>(s.stage))) return false;
  auto square = [](int k) { return static_cast<std::int64_t>(k) * k; };
  switch (static_cast<Stage>(s.stage)) {
    case Stage::start: s.rows = d.c_in, s.depth = square(d.start_kernel); break;
    case Stage::expand: s.rows = d.c_mid, s.depth = d.c_in * square(d.expand_kernel); break;
    case Stage::mid: s.rows = d.c_mid, s.depth = square(d.mid_kernel); break;
    case Stage::project: s.rows = d.c_out, s.depth = d.c_mid; break;
  }
  return true;
}

bool measure(const Head& h, StageSource& s) {
  const HeadDesc& d = h.desc();
  const int rows[] = {d.c_feat, d.c_hidden, d.classes};
  const int depth[] = {d.c_in, h.pooled(), d.c_hidden > 0 ? d.c_hidden : h.pooled()};
  if (s.stage < 0 || s.stage > 2 || rows[s.stage] == 0) return false;
  s.rows = rows[s.stage], s.depth = depth[s.stage];
  return true;
}

bool measure(const Mqa& m, StageSource& s) {
  const MqaDesc& d = m.desc();
  if (s.stage < 0 || s.stage >= kMqaStages || !m.has(static_cast<MqaStage>(s.stage))) return false;
  const std::int64_t taps = static_cast<std::int64_t>(d.kv_kernel) * d.kv_kernel;
  switch (static_cast<MqaStage>(s.stage)) {
    case MqaStage::norm:
    case MqaStage::query_norm: s.rows = d.c, s.depth = 0, s.bare = true; break;
    case MqaStage::query: s.rows = static_cast<std::int64_t>(d.heads) * d.key_dim, s.depth = d.c; break;
    case MqaStage::key_down:
    case MqaStage::value_down: s.rows = d.c, s.depth = taps; break;
    case MqaStage::key: s.rows = d.key_dim, s.depth = d.c; break;
    case MqaStage::value: s.rows = d.value_dim, s.depth = d.c; break;
    case MqaStage::output: s.rows = d.c, s.depth = static_cast<std::int64_t>(d.heads) * d.value_dim; break;
  }
  return true;
}

template <class T>
void measure_all(const T& op, std::vector<StageSource>& stages) {
  for (StageSource& s : stages) {
    if (!measure(op, s)) refuse("expected a stage that the operation has, got " + std::to_string(s.stage));
    const auto& [weight, bias, bn_weight, bn_bias, bn_mean, bn_var, gamma] = s.tensors;
    if (s.bare ? weight >= 0 || bias >= 0 || gamma >= 0 || bn_mean < 0 : weight < 0)
      refuse("expected a weight for each stage, and none for a norm");
    if ((bn_mean < 0) != (bn_var < 0) || (bn_mean < 0 && (bn_weight >= 0 || bn_bias >= 0)))
      refuse("expected bn_mean and bn_var together, and with bn_weight and bn_bias");
  }
}

}  // namespace

std::vector<DescribedOp> described(std::string_view text, std::size_t tensors, std::size_t eps) {
  const std::string_view first = take(text, '\n');
  if (first != "mnv4 1")
    refuse("expected a program of format 'mnv4 1', got '" + std::string(first.substr(0, 40)) + "'; export it again");
  std::vector<DescribedOp> found;
  std::vector<Op> ops;
  while (!text.empty()) {
    std::string_view line = take(text, '\n');
    const std::string_view kind = take(line, ' ');
    DescribedOp& o = found.emplace_back();
    if (kind == "Block") {
      BlockDesc d;
      o.stages = read(line,
                      {{"c_in", &d.c_in},
                       {"c_mid", &d.c_mid},
                       {"c_out", &d.c_out},
                       {"start_kernel", &d.start_kernel},
                       {"start_stride", &d.start_stride},
                       {"expand_kernel", &d.expand_kernel},
                       {"expand_stride", &d.expand_stride},
                       {"mid_kernel", &d.mid_kernel},
                       {"mid_stride", &d.mid_stride},
                       {"expand", nullptr, &d.expand},
                       {"project", nullptr, &d.project},
                       {"residual", nullptr, &d.residual},
                       {"padding", nullptr, &d.same_padding},
                       {"start_act", nullptr, nullptr, &d.act[0]},
                       {"expand_act", nullptr, nullptr, &d.act[1]},
                       {"mid_act", nullptr, nullptr, &d.act[2]},
                       {"project_act", nullptr, nullptr, &d.act[3]}},
                      tensors, eps);
      require_valid(check(d));
      o.block = std::make_unique<Block>(d);
      measure_all(*o.block, o.stages);
    } else if (kind == "Head") {
      HeadDesc d;
      o.stages = read(line,
                      {{"c_in", &d.c_in},
                       {"c_feat", &d.c_feat},
                       {"c_hidden", &d.c_hidden},
                       {"classes", &d.classes},
                       {"feat_act", nullptr, nullptr, &d.feat_act},
                       {"hidden_act", nullptr, nullptr, &d.hidden_act}},
                      tensors, eps);
      require_valid(check(d));
      o.head = std::make_unique<Head>(d);
      measure_all(*o.head, o.stages);
    } else if (kind == "MobileMQA") {
      MqaDesc d;
      o.stages = read(line,
                      {{"c", &d.c},
                       {"heads", &d.heads},
                       {"key_dim", &d.key_dim},
                       {"value_dim", &d.value_dim},
                       {"kv_kernel", &d.kv_kernel},
                       {"kv_stride", &d.kv_stride},
                       {"query_stride", &d.query_stride},
                       {"norm", nullptr, &d.norm},
                       {"query_norm", nullptr, &d.query_norm},
                       {"padding", nullptr, &d.same_padding},
                       {"residual", nullptr, &d.residual}},
                      tensors, eps);
      require_valid(check(d));
      o.mqa = std::make_unique<Mqa>(d);
      measure_all(*o.mqa, o.stages);
    } else {
      refuse("expected Block, Head or MobileMQA, got '" + std::string(kind.substr(0, 40)) + "'");
    }
    ops.push_back(o.op());
  }
  if (ops.empty()) refuse("expected at least one operation");
  require_valid(check(ops));
  return found;
}

}  // namespace mnv4
