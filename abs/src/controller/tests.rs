//! What must hold of a controller, by cases with known answers and by properties.

use proptest::prelude::*;

use super::*;
use crate::{Stage, Variant};

/// A batch of `samples` of 128 tokens in 4 groups that shows exactly the expected sums for noise σ² = `variance` and true
/// gradient |G|² = `signal`: σₜ² = 128σ², Σ‖G_k‖²/n_k = N|G|² + 4σₜ², ‖ΣG_k‖² = N²|G|² + Nσₜ².
fn expected_sums(samples: u64, variance: f64, signal: f64) -> Observation {
    let tokens = samples as f64 * 128.0;
    let token_variance = variance * 128.0;
    Observation {
        groups: 4,
        samples,
        tokens: samples * 128,
        group_square_norms: tokens * signal + 4.0 * token_variance,
        square_norm: tokens * (tokens * signal + token_variance),
        non_finite: 0,
    }
}

/// Noise that asks, at any batch b here, for far more than the growth limit: b' is near b/η² = 4b.
fn noisy(samples: u64) -> Observation {
    expected_sums(samples, 1e9, 1.0)
}

/// No noise: any batch is large enough.
fn quiet(samples: u64) -> Observation {
    expected_sums(samples, 0.0, 1.0)
}

fn norm_test() -> Settings {
    let rule = Rule::NormTest { eta: 0.5, variant: Variant::Unbiased };
    Settings { ema_decay: 0.0, ..Settings::new(64, 8192, 64, rule) }
}

fn run<const N: usize>(settings: Settings, observations: [fn(u64) -> Observation; N]) -> Vec<(u64, Reason)> {
    let mut controller = Controller::new(settings).unwrap();
    let mut step = |observation: fn(u64) -> Observation| {
        let decision = controller.observe(&observation(controller.batch()));
        assert_eq!(decision.batch, controller.batch());
        (decision.batch, decision.reason)
    };
    observations.into_iter().map(&mut step).collect()
}

/// Batch and reason after fifty steps whose noise has σ² = 800 and |G|² = 1.
fn settled(rule: Rule) -> (u64, Reason) {
    let mut controller = Controller::new(Settings { rule, ..norm_test() }).unwrap();
    let mut reason = Reason::Waiting;
    for _ in 0..50 {
        let decision = controller.observe(&expected_sums(controller.batch(), 800.0, 1.0));
        reason = decision.reason;
        assert!((decision.noise_scale.unwrap() / 800.0 - 1.0).abs() < 1e-9);
    }
    (controller.batch(), reason)
}

/// With E Q = |G|² + σ²/b the norm test is just met at σ²/b = η²(|G|² + σ²/b), so b = σ²(1 − η²)/(η²|G|²). Here
/// 800·0.75/0.25 = 2400, of which 2432 is the next multiple of 64. Without the noise in Q it is σ²/(η²|G|²) = 3200.
#[test]
fn norm_test_settles_where_theory_says() {
    let rule = |variant| Rule::NormTest { eta: 0.5, variant };
    assert_eq!(settled(rule(Variant::Unbiased)), (2432, Reason::Sufficient));
    assert_eq!(settled(rule(Variant::Debiased)), (3200, Reason::Sufficient));
}

/// Three quarters of 800 samples are 600, of which 640 is the next multiple of 64.
#[test]
fn noise_scale_settles_at_its_share() {
    assert_eq!(settled(Rule::NoiseScale { ratio: 0.75 }), (640, Reason::Sufficient));
}

/// E‖V̂‖₁ = (K − 1)σ²/b with K = 4 groups, so the printed test asks for at most 3/η² samples at any batch: 12 with η = 0.5,
/// far below the 64 that it starts from, which the unbiased one leaves at once. To grow, it needs an η below 3/64 in square.
#[test]
fn the_printed_formula_cannot_leave_a_batch_above_its_bound() {
    let printed = |eta| Rule::NormTest { eta, variant: Variant::PaperLiteral };
    assert_eq!(settled(printed(0.5)), (64, Reason::Sufficient));
    assert_eq!(settled(printed(0.22)), (64, Reason::Sufficient));
    // 3σ²/b / (η²(|G|² + σ²/b)) at b = 64: 37.5 / (0.0225 · 13.5) = 123.
    assert!(settled(printed(0.15)).0 > 64);
    let noise = expected_sums(64, 1e12, 1.0).noise().unwrap();
    assert!((norm_test::wanted(0.5, Variant::PaperLiteral, &noise).unwrap() - 12.0).abs() < 1e-6);
}

/// σ²/(η²(|G|² + σ²/b)) ≤ b/η²: sums as expected never ask for more, however large their noise, and
/// without a true gradient they ask for just that.
#[test]
fn the_unbiased_test_asks_for_at_most_the_batch_over_eta_squared() {
    for (eta, batch) in [(0.5, 64), (0.9, 256), (1.0, 64), (1.3, 1024)] {
        let asked = |variance, signal| {
            let noise = expected_sums(batch, variance, signal).noise().unwrap();
            norm_test::wanted(eta, Variant::Unbiased, &noise).unwrap()
        };
        let bound = batch as f64 / (eta * eta);
        for variance in [1e-3, 1.0, 1e3, 1e6, 1e9] {
            assert!(asked(variance, 1.0) < bound, "{eta}, {batch}, {variance}");
        }
        assert!((asked(1.0, 0.0) / bound - 1.0).abs() < 1e-12);
    }
}

/// A new run is told; an old one goes on, and does not grow.
#[test]
fn an_eta_by_which_no_batch_can_grow_is_refused_at_the_start_and_kept_by_a_resume() {
    let rule = |eta, variant| Rule::NormTest { eta, variant };
    for eta in [1.0, 1.5, 1e6] {
        let settings = Settings { rule: rule(eta, Variant::Unbiased), ..norm_test() };
        let message = Controller::new(settings.clone()).unwrap_err().to_string();
        for part in ["`rule.norm-test.eta`", "below 1", "at most b/eta²", "variant debiased"] {
            assert!(message.contains(part), "{message}");
        }
        assert_eq!(settings.check_growth().unwrap_err().to_string(), message);
        let state = Controller::new(norm_test()).unwrap().state().clone();
        let mut resumed = Controller::resume(settings, state).unwrap();
        for _ in 0..50 {
            assert_eq!(resumed.observe(&noisy(64)).reason, Reason::Sufficient);
        }
        for variant in [Variant::Debiased, Variant::PaperLiteral] {
            Controller::new(Settings { rule: rule(eta, variant), ..norm_test() }).unwrap();
        }
    }
    // The debiased variant grows by such an η: 800/1.5² = 355.6.
    assert_eq!(settled(rule(1.5, Variant::Debiased)), (384, Reason::Sufficient));
    Controller::new(Settings { rule: rule(1.0f64.next_down(), Variant::Unbiased), ..norm_test() }).unwrap();
}

#[test]
fn a_ramp_follows_the_samples_seen() {
    let rule = Rule::LinearRamp { end: 256, samples: 1000 };
    let mut controller = Controller::new(Settings { rule, ..norm_test() }).unwrap();
    let mut batches = vec![controller.batch()];
    while controller.state().samples < 1200 {
        let decision = controller.observe(&noisy(controller.batch()));
        assert_eq!((decision.reason, decision.wanted), (Reason::Scheduled, None));
        batches.push(decision.batch);
    }
    // Increments after 333⅓, 666⅔ and 1000 samples: six steps of 64 reach 384, three of 128 reach 768, two of 192 reach 1152.
    assert_eq!(batches, [64, 64, 64, 64, 64, 64, 128, 128, 128, 192, 192, 256, 256]);
}

/// Where noise drowns the gradient there is no noise scale: rules that divide by |Ĝ|² wait, the plain norm test does not.
#[test]
fn a_drowned_gradient_stops_only_rules_that_need_it() {
    let drowned = Observation { square_norm: 64.0 * 128.0, ..expected_sums(64, 1e4, 1.0) };
    let decide = |rule| Controller::new(Settings { rule, ..norm_test() }).unwrap().observe(&drowned).reason;
    assert_eq!(decide(Rule::NoiseScale { ratio: 1.0 }), Reason::NoGradient);
    assert_eq!(decide(Rule::NormTest { eta: 0.5, variant: Variant::Debiased }), Reason::NoGradient);
    assert_eq!(decide(Rule::NormTest { eta: 0.5, variant: Variant::Unbiased }), Reason::Grown);
}

#[test]
fn growth_doubles_until_the_cap_by_default() {
    use Reason::{AtCap, Grown};
    let settings = Settings { cap: 320, ..norm_test() };
    let expected = [(128, Grown), (256, Grown), (320, Grown), (320, AtCap)];
    assert_eq!(run(settings, [noisy; 4]), expected);
}

#[test]
fn a_test_that_says_nothing_ends_what_was_asked_in_a_row() {
    use Reason::{Grown, NoGradient, Waiting};
    let rule = Rule::NormTest { eta: 0.5, variant: Variant::Debiased };
    let drowned = |b| Observation { square_norm: 64.0 * 128.0, ..expected_sums(b, 1e4, 1.0) };
    let settings = Settings { patience: 2, rule, ..norm_test() };
    let expected = [(64, Waiting), (64, NoGradient), (64, Waiting), (128, Grown)];
    assert_eq!(run(settings, [noisy, drowned, noisy, noisy]), expected);
}

#[test]
fn patience_waits_for_consecutive_asks_and_starts_anew_after_each_growth() {
    use Reason::{Grown, Sufficient, Waiting};
    let settings = Settings { patience: 2, ..norm_test() };
    let observations = [noisy, quiet, noisy, noisy, noisy, noisy];
    let expected = [(64, Waiting), (64, Sufficient), (64, Waiting), (128, Grown), (128, Waiting), (256, Grown)];
    assert_eq!(run(settings, observations), expected);
}

#[test]
fn an_interval_tests_every_so_many_steps() {
    use Reason::{BetweenTests, Grown};
    let settings = Settings { interval: 3, ..norm_test() };
    let expected =
        [(64, BetweenTests), (64, BetweenTests), (128, Grown), (128, BetweenTests), (128, BetweenTests), (256, Grown)];
    assert_eq!(run(settings, [noisy; 6]), expected);
}

#[test]
fn only_without_monotone_does_a_batch_shrink() {
    use Reason::{Grown, Shrunk, Sufficient};
    let observations = [noisy, noisy, noisy, quiet, quiet];
    let kept = run(norm_test(), observations);
    assert_eq!(kept[2..], [(512, Grown), (512, Sufficient), (512, Sufficient)]);
    let settings = Settings { monotone: false, base: 192, ..norm_test() };
    let followed = run(settings, observations);
    assert_eq!(followed[2..], [(1536, Grown), (768, Shrunk), (384, Shrunk)]);
}

/// Ratio of smoothed values: (800·λ + 400)/(η²(Q₁λ + Q₂)), with Q = 1 + σ²/64 = 13.5 and 7.25. A smoothed ratio would
/// differ.
#[test]
fn numerator_and_denominator_are_smoothed_separately() {
    let settings = Settings { ema_decay: 0.75, patience: 9, ..norm_test() };
    let mut controller = Controller::new(settings).unwrap();
    controller.observe(&expected_sums(64, 800.0, 1.0));
    let decision = controller.observe(&expected_sums(64, 400.0, 1.0));
    let wanted = (800.0 * 0.75 + 400.0) / (0.25 * (13.5 * 0.75 + 7.25));
    assert!((decision.wanted.unwrap() / wanted - 1.0).abs() < 1e-12);
    let scale = (800.0 * 0.75 + 400.0) / 1.75; // |Ĝ|² = 1 in both
    assert!((decision.noise_scale.unwrap() / scale - 1.0).abs() < 1e-12);
}

#[test]
fn a_non_finite_step_changes_nothing_but_the_counters() {
    let settings = Settings { patience: 3, ..norm_test() };
    let mut controller = Controller::new(settings).unwrap();
    controller.observe(&noisy(64));
    let before = controller.state().clone();
    let bad = Observation { non_finite: 1, ..noisy(64) };
    let decision = controller.observe(&bad);
    assert_eq!(decision.reason, Reason::Unusable);
    assert_eq!(decision.noise, Err(Unusable::NonFinite));
    assert_eq!(decision.wanted, None);
    let counted = State { steps: 2, samples: 128, tokens: 128 * 128, ..before };
    assert_eq!(*controller.state(), counted);
}

#[test]
fn sums_that_overflow_when_smoothed_are_left_out() {
    let mut controller = Controller::new(Settings { ema_decay: 0.9, ..norm_test() }).unwrap();
    let huge =
        Observation { groups: 2, samples: 1, tokens: 1, group_square_norms: 1e308, square_norm: 1e308, non_finite: 0 };
    assert!(controller.observe(&huge).noise.is_ok());
    assert_eq!(controller.observe(&huge).noise, Err(Unusable::NonFinite));
    assert!(controller.state().noise.is_finite());
}

#[test]
fn a_zero_gradient_decides_nothing() {
    assert_eq!(run(norm_test(), [|b| expected_sums(b, 0.0, 0.0)]), [(64, Reason::NoGradient)]);
}

#[test]
fn constant_stays_at_base_and_still_reports_the_noise_scale() {
    let settings = Settings { rule: Rule::Constant, ..norm_test() };
    let mut controller = Controller::new(settings).unwrap();
    let decision = controller.observe(&expected_sums(64, 800.0, 1.0));
    assert_eq!((decision.batch, decision.reason), (64, Reason::Scheduled));
    assert!((decision.noise_scale.unwrap() / 800.0 - 1.0).abs() < 1e-12);
}

#[test]
fn stagewise_follows_samples_not_steps_and_ignores_the_growth_limit() {
    let stages = vec![Stage { batch: 64, share: 0.5 }, Stage { batch: 1024, share: 0.5 }];
    let rule = Rule::Stagewise { stages, horizon: 1000 };
    let mut controller = Controller::new(Settings { rule, ..norm_test() }).unwrap();
    // Steps of other sizes than asked for, and a non-finite one: the samples count all the same.
    let batches = [300, 199, 1].map(|samples| {
        let bad = Observation { non_finite: 1, ..noisy(samples) };
        controller.observe(&bad).batch
    });
    assert_eq!(batches, [64, 64, 1024]);
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let state = Controller::new(norm_test()).unwrap().state().clone();
    let refused = |settings: &Settings, change: fn(&mut State)| {
        let mut state = state.clone();
        change(&mut state);
        Controller::resume(settings.clone(), state).unwrap_err().to_string()
    };
    let settings = norm_test();
    assert_eq!(
        refused(&settings, |s| s.batch = 100),
        "saved batch-size state: `batch` is 100, expected a multiple of 64 between 64 and 8192; \
         resume with the settings of the saved run, or correct the state"
    );
    assert!(refused(&settings, |s| s.batch = 16384).contains("`batch` is 16384"));
    assert!(refused(&settings, |s| s.noise.variance = f64::NAN).contains("`noise`"));
    let constant = Settings { rule: Rule::Constant, ..settings };
    assert!(refused(&constant, |s| s.batch = 128).contains("expected 64, scheduled after 0 samples"));
}

fn any_settings() -> impl Strategy<Value = Settings> {
    let limits = (1u64..=64, 1u64..=8, 0u64..=200);
    let dynamics = (1.01..4.0f64, 1u32..=3, 0.0..0.99f64, 1u64..=3, any::<bool>());
    (limits, dynamics, 0..8usize, 0.1..2.0f64).prop_map(|(limits, dynamics, rule, eta)| {
        let (round_to, base, more) = limits;
        let (growth_limit, patience, ema_decay, interval, monotone) = dynamics;
        let (base, cap) = (base * round_to, (base + more) * round_to);
        let stages = vec![Stage { batch: base, share: 0.25 }, Stage { batch: cap, share: 0.75 }];
        let rule = match rule {
            0 => Rule::Constant,
            1 => Rule::Stagewise { stages, horizon: 10_000 },
            2 => Rule::LinearRamp { end: cap, samples: 10_000 },
            3 => Rule::NoiseScale { ratio: eta },
            4 => Rule::NormTest { eta, variant: Variant::Debiased },
            5 => Rule::NormTest { eta, variant: Variant::PaperLiteral },
            // Below 1, as a new run must have it.
            _ => Rule::NormTest { eta: eta / 2.0, variant: Variant::Unbiased },
        };
        Settings { base, cap, round_to, growth_limit, patience, ema_decay, interval, monotone, rule }
    })
}

/// Mostly plausible; now and then with one group, with non-finite values, or with sums that contradict each other.
fn any_observation() -> impl Strategy<Value = Observation> {
    let bad = prop_oneof![
        12 => Just(1.0),
        1 => Just(f64::NAN),
        1 => Just(f64::INFINITY),
        1 => Just(1e9),
        1 => Just(-1.0),
        1 => Just(0.0),
    ];
    let numbers = (1u64..=8, 1u64..=2000, 1u64..=512, -300i32..300);
    (numbers, 0.0..1.0f64, bad, prop::bool::weighted(0.05)).prop_map(
        |((groups, samples, length, magnitude), share, bad, non_finite)| {
            let tokens = samples * length;
            let group_square_norms = f64::from(magnitude).exp2();
            Observation {
                groups,
                samples,
                tokens,
                group_square_norms,
                square_norm: group_square_norms * tokens as f64 * share * bad,
                non_finite: non_finite.into(),
            }
        },
    )
}

fn through_json(controller: &Controller) -> Controller {
    let settings = serde_json::to_string(controller.settings()).unwrap();
    let state = serde_json::to_string(controller.state()).unwrap();
    let settings = serde_json::from_str(&settings).unwrap();
    Controller::resume(settings, serde_json::from_str(&state).unwrap()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_batch_keeps_the_settings(
        settings in any_settings(),
        observations in prop::collection::vec(any_observation(), 1..60),
    ) {
        let mut controller = Controller::new(settings.clone()).unwrap();
        for observation in &observations {
            let before = controller.batch();
            let Decision { batch, reason, .. } = controller.observe(observation);
            prop_assert!(settings.base <= batch && batch <= settings.cap);
            prop_assert_eq!(batch % settings.round_to, 0);
            prop_assert!(!settings.monotone || batch >= before);
            if reason != Reason::Scheduled {
                prop_assert_eq!(reason == Reason::Grown, batch > before);
                prop_assert_eq!(reason == Reason::Shrunk, batch < before);
                let most = (before as f64 * settings.growth_limit).max((before + settings.round_to) as f64);
                prop_assert!(batch as f64 <= most);
            }
        }
    }

    #[test]
    fn resumed_at_every_step_equals_uninterrupted(
        settings in any_settings(),
        observations in prop::collection::vec(any_observation(), 1..60),
    ) {
        let mut uninterrupted = Controller::new(settings.clone()).unwrap();
        let mut resumed = Controller::new(settings).unwrap();
        for observation in &observations {
            resumed = through_json(&resumed);
            prop_assert_eq!(uninterrupted.observe(observation), resumed.observe(observation));
            prop_assert_eq!(&uninterrupted, &resumed);
        }
    }

    /// The same eight microbatches, dealt in turn to 1, 2, 3, 4 or 8 ranks. Gradients are whole and n_k powers of two, so
    /// every sum is exact in any order.
    #[test]
    fn decisions_do_not_depend_on_how_groups_are_dealt_to_ranks(
        settings in any_settings(),
        steps in prop::collection::vec(prop::array::uniform8((0u32..4, prop::array::uniform3(-100i32..100))), 1..20),
    ) {
        let decide = |world: usize| -> Vec<Decision> {
            let mut controller = Controller::new(settings.clone()).unwrap();
            steps.iter().map(|groups| controller.observe(&summed_over(world, groups))).collect()
        };
        let alone = decide(1);
        for world in [2, 3, 4, 8] {
            prop_assert_eq!(&decide(world), &alone);
        }
    }
}

/// Sums each rank's own groups, then the ranks.
fn summed_over(world: usize, groups: &[(u32, [i32; 3]); 8]) -> Observation {
    let mut total = (0, 0, 0.0, [0.0; 3]);
    for rank in 0..world {
        let mut own = (0, 0, 0.0, [0.0; 3]);
        for (log_tokens, gradient) in groups.iter().skip(rank).step_by(world) {
            let tokens = 1u64 << log_tokens;
            let gradient = gradient.map(f64::from);
            own.0 += 1;
            own.1 += tokens;
            own.2 += gradient.iter().map(|g| g * g).sum::<f64>() / tokens as f64;
            own.3 = [0, 1, 2].map(|i| own.3[i] + gradient[i]);
        }
        total.0 += own.0;
        total.1 += own.1;
        total.2 += own.2;
        total.3 = [0, 1, 2].map(|i| total.3[i] + own.3[i]);
    }
    Observation {
        groups: total.0,
        samples: total.0,
        tokens: total.1,
        group_square_norms: total.2,
        square_norm: total.3.iter().map(|g| g * g).sum(),
        non_finite: 0,
    }
}

/// A pause between two asks, with patience and smoothing running: all of the state matters here.
#[test]
fn resume_in_the_middle_of_growth_is_exact() {
    let settings = Settings { patience: 3, interval: 2, ema_decay: 0.9, ..norm_test() };
    let mut uninterrupted = Controller::new(settings).unwrap();
    let sums = |step: u32, batch| expected_sums(batch, 1e4 / f64::from(step + 3), 0.1);
    for step in 0..11 {
        uninterrupted.observe(&sums(step, uninterrupted.batch()));
    }
    assert_eq!((uninterrupted.batch(), uninterrupted.state().asks), (128, 2));
    let mut resumed = through_json(&uninterrupted);
    for step in 11..60 {
        let observation = sums(step, resumed.batch());
        assert_eq!(resumed.observe(&observation), uninterrupted.observe(&observation));
    }
    assert!(resumed.batch() > 128, "it must grow after the pause for the test to mean something");
    assert_eq!(resumed, uninterrupted);
}
