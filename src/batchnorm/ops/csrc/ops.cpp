// The CPU kernels of the ops in schema.py: what each computes per channel, between its passes over the tensors.
//
// Comes from: torch's dispatcher. Goes to: passes.h.
#include <cmath>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "passes.h"

namespace {

ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
Tensor statistics_like(const Tensor& x) { return empty_channels(x.size(1), ScalarType::Double); }
Tensor channels_like(const Tensor& x) { return empty_channels(x.size(1), statistics_type(x)); }

template <class A> A* data_of(const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); }

// Where y tells dg/dz, y is kept of a layer with a residual, else the residual. As in schema.py.
Kept kept_for(Activation activation, double slope) {
  const bool result = activation == Activation::relu || activation == Activation::relu6 || activation == Activation::sigmoid ||
                      activation == Activation::tanh || (activation == Activation::leaky_relu && slope >= 0);
  return result ? Kept::result : Kept::residual;
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

// Algorithm 1: y = g((x - mu) / sqrt(var + eps) * gamma + beta + residual), with mu and var of each channel of x.
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual, double eps,
    int64_t activation, double slope) {
  check_input(input, activation), check_channels("weight", weight, input), check_channels("bias", bias, input);
  check_like("residual", residual, input);
  const Tensor x = dense(input), y = empty_as(x), mu = statistics_like(x), var = statistics_like(x);
  const MaybeTensor r = residual ? MaybeTensor(laid_out_as(*residual, x)) : std::nullopt;
  const auto g = Activation(activation);
  in_compute_type(x, [&]<class A>() {
    Job<A> job(x, slope);
    const int64_t C = job.g.C, m = job.g.values();
    if (C * m == 0) {
      std::fill_n(data_of<double>(mu), C, NAN), std::fill_n(data_of<double>(var), C, NAN);
      return;
    }
    job.y = write(y), job.kept = r ? read(*r) : nullptr;
    read_channels<A>(weight, C, 1, job.gamma), read_channels<A>(bias, C, 0, job.beta);
    set_near_mean(job);  // sums of x - K: E[x^2] - E[x]^2 alone would cancel
    run_passes<A>(
        {Pass::statistics, job.type, Activation::none, Kept::nothing, job.g.planes},
        {Pass::normalize, job.type, g, r ? Kept::residual : Kept::nothing, job.g.planes}, job, [&](int64_t c, bool quick) {
          const double shifted = job.sum[c] / m, spread = job.product[c] / m - shifted * shifted;
          if (quick && !(shifted * shifted <= FAR * spread && std::isfinite(spread))) return false;
          const double mean = job.mean[c] + shifted, biased = spread < 0 ? 0 : spread;
          data_of<double>(mu)[c] = mean, data_of<double>(var)[c] = biased;
          set_affine(job, c, mean, 1 / std::sqrt(biased + eps));
          return true;
        });
  });
  return {y, mu, var};
}

// y = g((x - mu) / sqrt(var + eps) * gamma + beta + residual) with the given mu and var.
Tensor normalize(
    const Tensor& input, const Tensor& mu, const Tensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
    const MaybeTensor& residual, double eps, int64_t activation, double slope) {
  check_input(input, activation), check_channels("mean", mu, input), check_channels("var", var, input);
  check_channels("weight", weight, input), check_channels("bias", bias, input), check_like("residual", residual, input);
  const Tensor x = dense(input), y = empty_as(x);
  const MaybeTensor r = residual ? MaybeTensor(laid_out_as(*residual, x)) : std::nullopt;
  in_compute_type(x, [&]<class A>() {
    Job<A> job(x, slope);
    const int64_t C = job.g.C;
    if (C * job.g.values() == 0) return;
    job.y = write(y), job.kept = r ? read(*r) : nullptr;
    read_channels<A>(weight, C, 1, job.gamma), read_channels<A>(bias, C, 0, job.beta);
    read_channels<double>(mu, C, 0, job.mu), read_channels<double>(var, C, 0, job.rstd);
    for (int64_t c = 0; c < C; ++c) set_affine(job, c, job.mu[c], 1 / std::sqrt(job.rstd[c] + eps));
    const Choice choice{Pass::normalize, job.type, Activation(activation), r ? Kept::residual : Kept::nothing, job.g.planes};
    write_group(leaf_for(choice), job, {0, C, C, job.g.threads}, 3, false);
  });
  return y;
}

// Section 3, for z = xhat * gamma + beta + residual, y = g(z): dx, dgamma, dbeta, dresidual.
// `kept` is y or the residual (kept_for); with training = false mu and var are constants.
// dresidual has no elements where there was no residual, or no activation: it is dy then.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& gradient, const Tensor& input, const Tensor& mu, const Tensor& var, const MaybeTensor& weight,
    const MaybeTensor& bias, const MaybeTensor& kept, double eps, int64_t activation, double slope, bool training) {
  check_input(input, activation), check_channels("mean", mu, input), check_channels("var", var, input);
  check_channels("weight", weight, input), check_channels("bias", bias, input);
  check_like("dy", gradient, input), check_like("kept", kept, input);
  const Tensor x = dense(input), dy = laid_out_as(gradient, x), dx = empty_as(x);
  const Tensor dgamma = channels_like(x), dbeta = channels_like(x);
  const auto g = Activation(activation);
  const Kept kind = kept && g != Activation::none ? kept_for(g, slope) : Kept::nothing;
  const MaybeTensor k = kind == Kept::nothing ? std::nullopt : MaybeTensor(laid_out_as(*kept, x));
  const Tensor dresidual = k ? empty_as(x) : empty_channels(0, x.scalar_type());
  in_compute_type(x, [&]<class A>() {
    Job<A> job(x, slope);
    const int64_t C = job.g.C, m = job.g.values();
    if (C * m == 0) {
      std::fill_n(data_of<A>(dgamma), C, A(0)), std::fill_n(data_of<A>(dbeta), C, A(0));
      return;
    }
    job.dy = read(dy), job.dx = write(dx);
    if (k) job.kept = read(*k), job.dresidual = write(dresidual);
    read_channels<A>(weight, C, 1, job.gamma), read_channels<A>(bias, C, 0, job.beta);
    read_channels<double>(mu, C, 0, job.mu), read_channels<double>(var, C, 0, job.rstd);
    for (int64_t c = 0; c < C; ++c) {
      job.rstd[c] = 1 / std::sqrt(job.rstd[c] + eps);
      set_affine(job, c, job.mu[c], job.rstd[c]);
    }
    run_passes<A>(
        {Pass::gradient_sums, job.type, g, kind, job.g.planes}, {Pass::input_gradient, job.type, g, kind, job.g.planes}, job,
        [&](int64_t c, bool quick) {
          if (quick && !(std::isfinite(job.sum[c]) && std::isfinite(job.product[c]))) return false;
          const double rest = job.mu[c] - job.mean[c];  // the loops subtract what A holds of mu
          const double product = job.product[c] - rest * job.sum[c];
          data_of<A>(dbeta)[c] = A(job.sum[c]);
          data_of<A>(dgamma)[c] = A(product * job.rstd[c]);
          if (training) {  // else the terms stay 0
            const double term = job.scale[c] * job.rstd[c] * job.rstd[c] * product / m;
            job.mean_term[c] = A(job.scale[c] * job.sum[c] / m - term * rest);
            job.centered_term[c] = A(term);
          }
          return true;
        });
  });
  return {dx, dgamma, dbeta, dresidual};
}

// running <- (1 - a) * running + a * batch with the unbiased variance (Algorithm 2, line 10); a = momentum, or 1 / batches
// for the plain average. `batches` counts this one first.
void update_running_(
    const Tensor& running_mean, const Tensor& running_var, const MaybeTensor& batches, const Tensor& mu, const Tensor& var,
    int64_t values, std::optional<double> momentum) {
  check_channels("var", var, mu, 0), check_running(running_mean, running_var, batches, momentum, mu, 0);
  const int64_t count = batches ? ++*data_of<int64_t>(*batches) : 0;
  if (values == 0) return;
  const double a = momentum ? *momentum : 1.0 / double(count), unbiased = double(values) / double(values - 1);
  const auto blend = [a](const Tensor& running, const Tensor& batch, double factor) {
    const Type type = type_of(running), from = type_of(batch);
    const int64_t C = running.size(0), stride = running.stride(0);
    void* to = running.mutable_data_ptr();
    const void* data = batch.const_data_ptr();
    for (int64_t c = 0; c < C; ++c)
      set_number(to, type, c * stride, (1 - a) * number_at(to, type, c * stride) + a * factor * number_at(data, from, c));
  };
  blend(running_mean, mu, 1), blend(running_var, var, unbiased);
}

// forward, and the running statistics with it.
std::tuple<Tensor, Tensor, Tensor> train(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    const MaybeTensor& running_mean, const MaybeTensor& running_var, const MaybeTensor& batches,
    std::optional<double> momentum, double eps, int64_t activation, double slope) {
  check_input(x, activation), check_running(running_mean, running_var, batches, momentum, x, 1);
  auto results = forward(x, weight, bias, residual, eps, activation, slope);
  const auto& [y, mu, var] = results;
  if (running_mean && running_var)
    update_running_(*running_mean, *running_var, batches, mu, var, x.size(1) ? x.numel() / x.size(1) : 0, momentum);
  else if (batches) ++*data_of<int64_t>(*batches);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, library) {
  library.impl("forward", TORCH_BOX(&forward));
  library.impl("normalize", TORCH_BOX(&normalize));
  library.impl("backward", TORCH_BOX(&backward));
  library.impl("train", TORCH_BOX(&train));
  library.impl("update_running_", TORCH_BOX(&update_running_));
}
