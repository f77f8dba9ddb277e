// The CPU kernels of the ops in schema.py: what each computes per channel, between its passes over the tensors.
#include <cmath>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "passes.h"

namespace {

ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
Tensor statistics_like(const Tensor& x) { return empty_channels(x.size(1), ScalarType::Double); }
Tensor statistics_like(const Tensor& x, int64_t groups) {
  const int64_t sizes[] = {groups, x.size(1)}, strides[] = {x.size(1), 1};
  return empty(2, sizes, strides, ScalarType::Double);
}
Tensor channels_like(const Tensor& x) { return empty_channels(x.size(1), statistics_type(x)); }

template <class A> A* data_of(const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); }
template <class A> void fill_channels(A value, const Tensor& a, const Tensor& b) {
  for (const Tensor* t : {&a, &b}) std::fill_n(data_of<A>(*t), t->numel(), value);
}

// Calls body<A>() with the type that x is computed in.
template <class Body> auto in_compute_type(const Tensor& x, Body body) {
  return x.scalar_type() == ScalarType::Double ? body.template operator()<double>() : body.template operator()<float>();
}

// z = (x - mu) * rstd * gamma + beta, as the leaf loops compute it: (x - mean) * scale + shift with mean the part of mu that
// A holds. The rest of mu goes into the shift: where |mu| is large, rounding it would be an error of many ulp in x - mu.
template <class A> void set_affine(const Job<A>& job, int64_t c, double mu, double rstd) {
  job.mean[c] = A(mu);
  job.scale[c] = A(job.gamma[c] * rstd);
  job.shift[c] = A(job.beta[c] - (mu - job.mean[c]) * job.scale[c]);
}

// From the sums of x - K and of its square: mean and biased variance (Algorithm 1, lines 1 and 2). False where quick sums
// are not exact enough.
template <class A> bool set_statistics(const Job<A>& job, int64_t c, bool quick, double& mu, double& var) {
  const double m = double(job.g.values()), shifted = job.sum[c] / m, spread = job.product[c] / m - shifted * shifted;
  if (quick && !(shifted * shifted <= FAR * spread && std::isfinite(spread))) return false;
  mu = job.mean[c] + shifted, var = spread < 0 ? 0 : spread;
  return true;
}

// mu and var of each channel of x.
std::tuple<Tensor, Tensor> statistics(const Tensor& input) {
  check_input(input, 0);
  const Tensor x = dense(input), mu = statistics_like(x), var = statistics_like(x);
  in_compute_type(x, [&]<class A>() {
    Job<A> job(x, whole(x));
    if (job.g.C * job.g.values() == 0) return fill_channels<double>(NAN, mu, var);
    set_near_mean(job);
    run_passes<A>({Pass::statistics, job.type, Activation::none, Kept::nothing, job.g.planes}, std::nullopt, job,
                  [&](int64_t c, bool quick) { return set_statistics(job, c, quick, data_of<double>(mu)[c], data_of<double>(var)[c]); });
  });
  return {mu, var};
}

// Algorithm 1 for one part of the examples: y = g((x - mu) / sqrt(var + eps) * gamma + beta + residual), with mu and var of
// each channel of the part.
template <class A>
void normalize_part(
    const Tensor& x, Part part, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual, double eps,
    Activation g, double a, double b, const Tensor& y, double* mu, double* var) {
  Job<A> job(x, part, a, b);
  job.y = job.out(y), job.kept = residual ? job.in(*residual) : nullptr;
  read_channels<A>(weight, job.g.C, 1, job.gamma), read_channels<A>(bias, job.g.C, 0, job.beta);
  set_near_mean(job);  // sums of x - K: E[x^2] - E[x]^2 alone would cancel
  run_passes<A>(
      {Pass::statistics, job.type, Activation::none, Kept::nothing, job.g.planes},
      Choice{Pass::normalize, job.type, g, residual ? Kept::residual : Kept::nothing, job.g.planes}, job,
      [&](int64_t c, bool quick) {
        if (!set_statistics(job, c, quick, mu[c], var[c])) return false;
        set_affine(job, c, mu[c], 1 / std::sqrt(var[c] + eps));
        return true;
      });
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual, double eps,
    int64_t activation, double a, double b) {
  check_input(input, activation), check_channels("weight", weight, input), check_channels("bias", bias, input);
  check_like("residual", residual, input);
  const Tensor x = dense(input), y = empty_as(x), mu = statistics_like(x), var = statistics_like(x);
  const MaybeTensor r = residual ? MaybeTensor(laid_out_as(*residual, x)) : std::nullopt;
  in_compute_type(x, [&]<class A>() {
    if (x.numel() == 0) return fill_channels<double>(NAN, mu, var);
    normalize_part<A>(x, whole(x), weight, bias, r, eps, Activation(activation), a, b, y, data_of<double>(mu), data_of<double>(var));
  });
  return {y, mu, var};
}

// Many groups are shared out among the threads, few are done by all threads together.
int64_t workers_for(int64_t groups) {
  const int64_t threads = torch::stable::get_num_threads();
  return groups >= 2 * threads ? threads : 1;
}

// Each group of examples, `size` of them and in the last what is left, by itself: body(worker, group, part).
template <class Body> void for_each_group(const Tensor& x, int64_t size, int64_t groups, const Body& body) {
  const int64_t workers = workers_for(groups), threads = workers == 1 ? torch::stable::get_num_threads() : 1;
  parallel(workers, [&](int64_t worker) {
    for (int64_t i = groups * worker / workers; i < groups * (worker + 1) / workers; ++i)
      body(worker, i, Part{i * size, i + 1 < groups ? size : x.size(0) - i * size, threads});
  });
}

// forward for each group: mu and var are (groups, C).
std::tuple<Tensor, Tensor, Tensor> forward_groups(
    const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual, double eps,
    int64_t activation, double a, double b, int64_t size, int64_t groups) {
  check_input(input, activation), check_channels("weight", weight, input), check_channels("bias", bias, input);
  check_like("residual", residual, input), check_groups(input, size, groups);
  const Tensor x = dense(input), y = empty_as(x), mu = statistics_like(x, groups), var = statistics_like(x, groups);
  const MaybeTensor r = residual ? MaybeTensor(laid_out_as(*residual, x)) : std::nullopt;
  in_compute_type(x, [&]<class A>() {
    if (x.numel() == 0) return fill_channels<double>(NAN, mu, var);
    for_each_group(x, size, groups, [&](int64_t, int64_t i, Part part) {
      const int64_t first = i * x.size(1);
      normalize_part<A>(x, part, weight, bias, r, eps, Activation(activation), a, b, y, data_of<double>(mu) + first,
                        data_of<double>(var) + first);
    });
  });
  return {y, mu, var};
}

// y = g((x - mu) / sqrt(var + eps) * gamma + beta + residual) with the given mu and var.
Tensor normalize(
    const Tensor& input, const Tensor& mu, const Tensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
    const MaybeTensor& residual, double eps, int64_t activation, double a, double b) {
  check_input(input, activation), check_channels("mean", mu, input), check_channels("var", var, input);
  check_channels("weight", weight, input), check_channels("bias", bias, input), check_like("residual", residual, input);
  const Tensor x = dense(input), y = empty_as(x);
  const MaybeTensor r = residual ? MaybeTensor(laid_out_as(*residual, x)) : std::nullopt;
  in_compute_type(x, [&]<class A>() {
    Job<A> job(x, whole(x), a, b);
    const int64_t C = job.g.C;
    if (C * job.g.values() == 0) return;
    job.y = job.out(y), job.kept = r ? job.in(*r) : nullptr;
    read_channels<A>(weight, C, 1, job.gamma), read_channels<A>(bias, C, 0, job.beta);
    read_channels<double>(mu, C, 0, job.mu), read_channels<double>(var, C, 0, job.rstd);
    for (int64_t c = 0; c < C; ++c) set_affine(job, c, job.mu[c], 1 / std::sqrt(job.rstd[c] + eps));
    write_all({Pass::normalize, job.type, Activation(activation), r ? Kept::residual : Kept::nothing, job.g.planes}, job);
  });
  return y;
}

// What the gradient ops have in common: z = xhat * gamma + beta + residual, y = g(z), of which `kept` is y or the residual
// (kept_for). Checked, laid out alike.
struct Gradient {
  Tensor x, dy, mu, var;
  MaybeTensor weight, bias, kept;
  double eps, a, b;
  Activation g;
  Kept kind;

  Gradient(const Tensor& gradient, const Tensor& input, const Tensor& mu, const Tensor& var, const MaybeTensor& weight,
           const MaybeTensor& bias, const MaybeTensor& given, double eps, int64_t activation, double a, double b)
      : x(input), dy(gradient), mu(mu), var(var), weight(weight), bias(bias), eps(eps), a(a), b(b), g(Activation(activation)) {
    check_input(input, activation), check_channels("weight", weight, input), check_channels("bias", bias, input);
    check_like("dy", gradient, input), check_like("kept", given, input);
    x = dense(input), dy = laid_out_as(gradient, x);
    kind = given && g != Activation::none ? kept_for(g, a) : Kept::nothing;
    if (kind != Kept::nothing) kept = laid_out_as(*given, x);
  }

  // dresidual has no elements where there was no residual, or no activation: it is dy then.
  Tensor empty_dresidual() const { return kept ? empty_as(x) : empty_channels(0, x.scalar_type()); }

  // Of one part of the examples, whose mu and var are this row of theirs.
  template <class A> Job<A> job(Part part, int64_t row = 0) const {
    Job<A> job(x, part, a, b);
    const int64_t C = job.g.C;
    job.dy = job.in(dy), job.kept = kept ? job.in(*kept) : nullptr;
    read_channels<A>(weight, C, 1, job.gamma), read_channels<A>(bias, C, 0, job.beta);
    read_channels<double>(mu, C, 0, job.mu, row), read_channels<double>(var, C, 0, job.rstd, row);
    for (int64_t c = 0; c < C; ++c) {
      job.rstd[c] = 1 / std::sqrt(job.rstd[c] + eps);
      set_affine(job, c, job.mu[c], job.rstd[c]);
    }
    return job;
  }

  template <class A> Choice choice(Pass pass, const Job<A>& job) const { return {pass, job.type, g, kind, job.g.planes}; }
};

// The sums of dz and of dz * xhat. False where quick sums are not finite.
template <class A> bool set_gradient_sums(const Job<A>& job, int64_t c, bool quick, double& dz, double& dz_xhat) {
  if (quick && !(std::isfinite(job.sum[c]) && std::isfinite(job.product[c]))) return false;
  const double rest = job.mu[c] - job.mean[c];  // the loops subtract what A holds of mu
  dz = job.sum[c], dz_xhat = (job.product[c] - rest * job.sum[c]) * job.rstd[c];
  return true;
}

// dx = gamma * rstd * (dz - E[dz] - xhat * E[dz * xhat]), as the loops compute it: scale * dz - mean_term - (x - mean) *
// centered_term.
template <class A> void set_terms(const Job<A>& job, int64_t c, double dz, double dz_xhat) {
  const double term = job.scale[c] * job.rstd[c] * dz_xhat;
  job.mean_term[c] = A(job.scale[c] * dz - term * (job.mu[c] - job.mean[c]));
  job.centered_term[c] = A(term);
}

// The local sums of the gradient, for who adds up those of others before `input_gradient`.
std::tuple<Tensor, Tensor> gradient_sums(
    const Tensor& dy, const Tensor& x, const Tensor& mu, const Tensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
    const MaybeTensor& kept, double eps, int64_t activation, double a, double b) {
  const Gradient given(dy, x, mu, var, weight, bias, kept, eps, activation, a, b);
  check_channels("mean", mu, x), check_channels("var", var, x);
  const Tensor dz = statistics_like(x), dz_xhat = statistics_like(x);
  in_compute_type(x, [&]<class A>() {
    const Job<A> job = given.job<A>(whole(x));
    if (job.g.C * job.g.values() == 0) return fill_channels<double>(0, dz, dz_xhat);
    run_passes<A>(given.choice(Pass::gradient_sums, job), std::nullopt, job, [&](int64_t c, bool quick) {
      return set_gradient_sums(job, c, quick, data_of<double>(dz)[c], data_of<double>(dz_xhat)[c]);
    });
  });
  return {dz, dz_xhat};
}

// dx and dresidual, with the given means of dz and of dz * xhat.
std::tuple<Tensor, Tensor> input_gradient(
    const Tensor& dy, const Tensor& x, const Tensor& mu, const Tensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
    const MaybeTensor& kept, double eps, int64_t activation, double a, double b, const Tensor& dz_mean, const Tensor& dz_xhat_mean) {
  const Gradient given(dy, x, mu, var, weight, bias, kept, eps, activation, a, b);
  check_channels("mean", mu, x), check_channels("var", var, x);
  check_channels("dz_mean", dz_mean, x), check_channels("dz_xhat_mean", dz_xhat_mean, x);
  const Tensor dx = empty_as(given.x), dresidual = given.empty_dresidual();
  in_compute_type(x, [&]<class A>() {
    Job<A> job = given.job<A>(whole(x));
    if (job.g.C * job.g.values() == 0) return;
    job.dx = job.out(dx), job.dresidual = given.kept ? job.out(dresidual) : nullptr;
    read_channels<double>(dz_mean, job.g.C, 0, job.sum), read_channels<double>(dz_xhat_mean, job.g.C, 0, job.product);
    for (int64_t c = 0; c < job.g.C; ++c) set_terms(job, c, job.sum[c], job.product[c]);
    write_all(given.choice(Pass::input_gradient, job), job);
  });
  return {dx, dresidual};
}

// Section 3 for one part of the examples, both in one go. With training = false mu and var are constants.
template <class A>
void gradient_of_part(
    const Gradient& given, Part part, int64_t row, bool training, const Tensor& dx, const Tensor& dresidual, double* dgamma,
    double* dbeta) {
  Job<A> job = given.job<A>(part, row);
  const double m = double(job.g.values());
  job.dx = job.out(dx), job.dresidual = given.kept ? job.out(dresidual) : nullptr;
  run_passes<A>(
      given.choice(Pass::gradient_sums, job), given.choice(Pass::input_gradient, job), job, [&](int64_t c, bool quick) {
        if (!set_gradient_sums(job, c, quick, dbeta[c], dgamma[c])) return false;
        if (training) set_terms(job, c, dbeta[c] / m, dgamma[c] / m);  // else the terms stay 0
        return true;
      });
}

// dx, dgamma, dbeta, dresidual; each group has a row of mu and var of its own.
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients(const Gradient& given, int64_t size, int64_t groups, bool training) {
  const Tensor& x = given.x;
  const int64_t C = x.size(1);
  const Tensor dx = empty_as(x), dgamma = channels_like(x), dbeta = channels_like(x), dresidual = given.empty_dresidual();
  in_compute_type(x, [&]<class A>() {
    if (x.numel() == 0) return fill_channels<A>(0, dgamma, dbeta);
    const int64_t workers = workers_for(groups), width = 2 * padded(C);
    const Array<double> sums(2 * workers * width);  // of each worker: of its groups together, of the one at hand
    for_each_group(x, size, groups, [&](int64_t worker, int64_t i, Part part) {
      double *all = &sums[2 * worker * width], *one = all + width;
      gradient_of_part<A>(given, part, i, training, dx, dresidual, one, one + padded(C));
      for (int64_t j = 0; j < width; ++j) all[j] += one[j];
    });
    for (int64_t c = 0; c < C; ++c) {
      double gamma = 0, beta = 0;
      for (int64_t w = 0; w < workers; ++w) gamma += sums[2 * w * width + c], beta += sums[2 * w * width + padded(C) + c];
      data_of<A>(dgamma)[c] = A(gamma), data_of<A>(dbeta)[c] = A(beta);
    }
  });
  return {dx, dgamma, dbeta, dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& x, const Tensor& mu, const Tensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
    const MaybeTensor& kept, double eps, int64_t activation, double a, double b, bool training) {
  const Gradient given(dy, x, mu, var, weight, bias, kept, eps, activation, a, b);
  check_channels("mean", mu, x), check_channels("var", var, x);
  return gradients(given, x.size(0), 1, training);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_groups(
    const Tensor& dy, const Tensor& x, const Tensor& mu, const Tensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
    const MaybeTensor& kept, double eps, int64_t activation, double a, double b, int64_t size, int64_t groups) {
  const Gradient given(dy, x, mu, var, weight, bias, kept, eps, activation, a, b);
  check_groups(x, size, groups), check_rows("mean", mu, x, groups), check_rows("var", var, x, groups);
  return gradients(given, size, groups, true);
}

// running <- (1 - a) * running + a * batch with the unbiased variance (Algorithm 2, line 10); a = momentum, or 1 over the
// number of batches for the plain average. `batches` counts this one first. With `skipped`, a channel that would not stay
// finite is left as it is, and counts one there; in the plain average, whose divisor is one number for all channels, such a
// batch enters in no channel and is not counted (`running.py` says why).
void update_running_(
    const Tensor& running_mean, const Tensor& running_var, const MaybeTensor& batches, const MaybeTensor& skipped,
    std::optional<double> momentum, const Tensor& mu, const Tensor& var, int64_t values) {
  check_channels("var", var, mu, 0), check_running(running_mean, running_var, batches, skipped, momentum, mu, 0);
  const double unbiased = double(values) / double(values - 1);
  const auto batch_mean = [&](int64_t c) { return number_at(mu.const_data_ptr(), type_of(mu), c); };
  const auto batch_var = [&](int64_t c) { return unbiased * number_at(var.const_data_ptr(), type_of(var), c); };
  const auto leave_out = [&](int64_t c) { ++data_of<int64_t>(*skipped)[c * skipped->stride(0)]; };
  if (!momentum && skipped && values) {
    bool enters = true;
    for (int64_t c = 0; c < mu.size(0); ++c) {
      if (std::isfinite(rounded(batch_mean(c), type_of(running_mean))) &&
          std::isfinite(rounded(batch_var(c), type_of(running_var)))) continue;
      leave_out(c), enters = false;
    }
    if (!enters) return;
  }
  const int64_t count = batches ? ++*data_of<int64_t>(*batches) : 0;
  if (values == 0) return;
  const double a = momentum ? *momentum : 1.0 / double(std::max<int64_t>(count, 1));
  const auto blended = [&](const Tensor& running, double batch, int64_t c) {
    const double old = number_at(running.const_data_ptr(), type_of(running), c * running.stride(0));
    return rounded((1 - a) * old + a * batch, type_of(running));
  };
  for (int64_t c = 0; c < mu.size(0); ++c) {
    const double mean = blended(running_mean, batch_mean(c), c), variance = blended(running_var, batch_var(c), c);
    if (skipped && momentum && !(std::isfinite(mean) && std::isfinite(variance))) {
      leave_out(c);
      continue;
    }
    set_number(running_mean.mutable_data_ptr(), type_of(running_mean), c * running_mean.stride(0), mean);
    set_number(running_var.mutable_data_ptr(), type_of(running_var), c * running_var.stride(0), variance);
  }
}

// forward, and the running statistics with it.
std::tuple<Tensor, Tensor, Tensor> train(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual, double eps,
    int64_t activation, double a, double b, const MaybeTensor& running_mean, const MaybeTensor& running_var,
    const MaybeTensor& batches, const MaybeTensor& skipped, std::optional<double> momentum) {
  check_input(x, activation), check_running(running_mean, running_var, batches, skipped, momentum, x, 1);
  auto results = forward(x, weight, bias, residual, eps, activation, a, b);
  const auto& [y, mu, var] = results;
  const int64_t values = x.size(1) ? x.numel() / x.size(1) : 0;
  if (running_mean && running_var) update_running_(*running_mean, *running_var, batches, skipped, momentum, mu, var, values);
  else if (batches) ++*data_of<int64_t>(*batches);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, library) {
  library.impl("statistics", TORCH_BOX(&statistics));
  library.impl("forward", TORCH_BOX(&forward));
  library.impl("normalize", TORCH_BOX(&normalize));
  library.impl("gradient_sums", TORCH_BOX(&gradient_sums));
  library.impl("input_gradient", TORCH_BOX(&input_gradient));
  library.impl("backward", TORCH_BOX(&backward));
  library.impl("forward_groups", TORCH_BOX(&forward_groups));
  library.impl("backward_groups", TORCH_BOX(&backward_groups));
  library.impl("train", TORCH_BOX(&train));
  library.impl("update_running_", TORCH_BOX(&update_running_));
}
