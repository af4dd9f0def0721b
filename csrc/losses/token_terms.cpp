#include "losses/token_terms.h"

#include <cmath>

namespace repo {
namespace {

constexpr float kLogRatioClamp = 20.0f;

// logp - base; 0 for two equal infinities: a token impossible under both policies has ratio 1.
float log_difference(float logp, float base) { return logp == base ? 0.0f : logp - base; }

struct Clamped {
    float value, inside;  // inside: the slope, 1 inside and 0 where the clamp acts
};

Clamped clamp_log_ratio(float x) {
    if (x > kLogRatioClamp) return {kLogRatioClamp, 0};
    if (x < -kLogRatioClamp) return {-kLogRatioClamp, 0};
    return {x, x == x ? 1.0f : 0.0f};
}

float combined_advantage(const Arguments& of, Place place, bool unsafe) {
    const float lam = of.scalars.lam;
    float advantage = of.reward_advantages.at(place);
    if (of.code.cost == kCostGiven) {
        advantage -= lam * of.cost_advantages.at(place);
    } else if (of.code.cost == kCostGated) {
        advantage -= lam * (unsafe ? of.cost_advantages.at(place) : 0.0f);
    } else if (of.code.cost == kCostHinge) {
        advantage -= lam * (of.hinge(place) - (of.cost_baselines ? of.cost_baselines.at(place) : 0.0f));
    }
    return of.code.normalize ? advantage / (1 + lam) : advantage;
}

struct Surrogate {
    float value, active;  // active: 1 if the unclipped branch carries the gradient, as it does at a tie
};

// -min(rho A, clip(rho) A), for A < 0 at most -c A
Surrogate clipped_surrogate(float ratio, float advantage, float low, float high, float dual_clip) {
    const float unclipped = ratio * advantage;
    const float clipped = (ratio < low ? low : ratio > high ? high : ratio) * advantage;
    float objective = clipped < unclipped ? clipped : unclipped;
    bool active = unclipped <= clipped;
    const float floor = dual_clip * advantage;
    if (advantage < 0 && floor > objective) {
        objective = floor;
        active = false;
    }
    return {-objective, active ? 1.0f : 0.0f};
}

struct KlTerm {
    float kl, kappa, slope;  // KL without rho, kappa (the loss adds beta kappa), d kappa / d log pi
};

KlTerm kl_term(float logp, float ref_logp, float ratio, float ratio_inside, const Code& code) {
    const Clamped delta = clamp_log_ratio(log_difference(logp, ref_logp));
    float kl = delta.value, slope = 1;
    if (code.kl == kK2) {
        kl = 0.5f * delta.value * delta.value;
        slope = delta.value;
    } else if (code.kl == kK3) {
        const float expm1 = std::expm1(-delta.value);
        kl = expm1 + delta.value;
        slope = -expm1;
    }
    if (!code.kl_importance_weighted || code.kl == kK2) return {kl, kl, slope * delta.inside};
    // d(rho KL)/d log pi = rho KL + rho KL'. For k3 that is rho delta, a form used also where delta is clamped.
    float derivative = ratio * (kl * ratio_inside + slope * delta.inside);
    if (code.kl == kK3) derivative = ratio_inside > 0 ? ratio * delta.value : ratio * slope * delta.inside;
    return {kl, ratio * kl, derivative};
}

}  // namespace

TokenTerms token_terms(const Arguments& of, Place place, float weight, const Probabilities& in) {
    const Scalars& scalars = of.scalars;
    const Code& code = of.code;
    const float importance_weight = of.importance_weights ? of.importance_weights.at(place) : 1.0f;
    const bool unsafe = of.costs && of.costs.at(place) > of.cost_limit(place);
    const float advantage = combined_advantage(of, place, unsafe);
    Clamped log_ratio = {0, 1};
    if (!code.on_policy) log_ratio = clamp_log_ratio(log_difference(in.logp, of.old_logps.at(place)));
    const float ratio = std::exp(log_ratio.value);
    const float low = 1 - scalars.eps_low, high = 1 + scalars.eps_high;
    const Surrogate surrogate = clipped_surrogate(ratio, advantage, low, high, scalars.dual_clip);

    // d(-rho A)/d log pi = -rho A on the branch that is the minimum
    float g_logp = importance_weight * (-ratio * advantage * surrogate.active * log_ratio.inside);
    float loss = importance_weight * surrogate.value, kl = 0, g_kl = 0, g_entropy = 0;
    if (code.kl == kFullKl) {
        kl = in.kl;
        loss += scalars.beta * kl;
        g_kl = weight * scalars.beta;
    } else if (code.kl != kNoKl) {
        const KlTerm term = kl_term(in.logp, of.ref_logps.at(place), ratio, log_ratio.inside, code);
        kl = term.kl;
        loss += scalars.beta * term.kappa;
        g_logp += scalars.beta * term.slope;
    }
    if (in.with_entropy) {
        loss -= scalars.entropy_coef * in.entropy;
        g_entropy = -weight * scalars.entropy_coef;
    }
    const bool clipped_low = ratio < low && advantage < 0, clipped_high = ratio > high && advantage > 0;
    const float scale = scalars.grad_scale;
    TokenTerms out;
    out.row[kLoss] = weight * loss;
    out.row[kLogp] = in.logp;
    out.row[kEntropy] = in.with_entropy ? in.entropy : 0;
    out.row[kKl] = kl;
    out.row[kLogRatio] = log_ratio.value;
    out.flags = kLive | (unsafe ? kUnsafe : 0) | (clipped_low ? kClippedLow : 0) | (clipped_high ? kClippedHigh : 0);
    out.slopes = {weight * g_logp * scale, g_entropy * scale, g_kl * scale};
    return out;
}

}  // namespace repo
