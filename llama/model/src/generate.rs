//! Text out, token by token: how the next one is chosen.

use std::ops::ControlFlow;

use pillion_kernels::random;
use pillion_runtime::Engine;

use crate::decoder::Decoder;

/// Why there is no text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The runtime.
    #[error(transparent)]
    Runtime(#[from] pillion_runtime::Error),
    /// What the model says of the next token.
    #[error("the model's outputs are not finite, so its weights are broken: use an older checkpoint")]
    NonFinite,
}

/// How a token is chosen. What is left after each limit, in this order, is what it is drawn from;
/// each number's default leaves all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// What logits of tokens that the text has are divided by where they are above 0, and else
    /// multiplied with (Keskar et al. 2019).
    pub repetition_penalty: f64,
    /// Divides the logits; 0 takes the likeliest token, the first of equal ones.
    pub temperature: f64,
    /// So many of the likeliest tokens; 0 for all.
    pub top_k: usize,
    /// The fewest of the likeliest tokens whose probabilities sum to this (Holtzman et al. 2020).
    pub top_p: f64,
    /// Tokens whose probability is at least this share of the likeliest's (Nguyen et al. 2024).
    pub min_p: f64,
    /// Of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling { repetition_penalty: 1.0, temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1 }
    }
}

/// Goes on from `prompt` for at most `count` tokens, chosen among the first `known` of the
/// vocabulary; hands each to `each` as soon as it is chosen, until that breaks. Every rank calls it
/// alike and gets the same.
///
/// A text that becomes longer than the decoder's capacity goes on from its last half.
///
/// # Errors
/// [`Error::NonFinite`] when the model's logits are not finite; when another rank has failed; those
/// of `each`.
///
/// # Panics
/// With an empty prompt, or one beyond the decoder's capacity.
pub fn generate<E: From<Error>>(
    engine: &mut Engine,
    decoder: &mut Decoder,
    known: usize,
    prompt: &[u32],
    count: usize,
    sampling: &Sampling,
    mut each: impl FnMut(u32) -> Result<ControlFlow<()>, E>,
) -> Result<(), E> {
    assert!(!prompt.is_empty(), "text goes on from a prompt of at least one token");
    assert!(prompt.len() <= decoder.capacity(), "a prompt of {} tokens", prompt.len());
    let mut text = prompt.to_vec();
    decoder.clear();
    let mut first = 0;
    for index in 0..count {
        let mut new = &text[first + decoder.len()..];
        if new.len() > decoder.capacity() - decoder.len() {
            first = text.len() - (decoder.capacity() / 2).max(1);
            decoder.clear();
            new = &text[first..];
        }
        let mut step = engine.begin_evaluation(Decoder::rounds(new.len())).map_err(Error::from)?;
        let mut logits = decoder.feed(&mut step, new).map_err(Error::from)?;
        step.end().map_err(Error::from)?;
        logits.truncate(known);
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err(Error::NonFinite.into());
        }
        let chosen = choose(&logits, &text[first..], sampling, random::uniform(sampling.seed, 0, index as u64));
        // Ranks with other processors may have rounded otherwise: rank 0 decides for all.
        let all = engine.communicator().all_gather_scalars(&[chosen as u64]);
        let chosen = all.map_err(pillion_runtime::Error::from).map_err(Error::from)?[0][0] as u32;
        text.push(chosen);
        if each(chosen)?.is_break() {
            break;
        }
    }
    Ok(())
}

/// The token at which the cumulated probabilities, of tokens in order, pass `uniform`.
fn choose(logits: &[f32], text: &[u32], sampling: &Sampling, uniform: f64) -> usize {
    let Sampling { repetition_penalty, temperature, top_k, top_p, min_p, .. } = *sampling;
    let mut logits: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
    if repetition_penalty != 1.0 {
        let mut seen: Vec<u32> = text.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit *= if *logit > 0.0 { 1.0 / repetition_penalty } else { repetition_penalty };
            }
        }
    }
    let largest = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("a vocabulary");
    if temperature == 0.0 {
        return largest;
    }
    let most = logits[largest];
    let weights: Vec<f64> = logits.iter().map(|logit| ((logit - most) / temperature).exp()).collect();
    // The likeliest first; of equal ones the first.
    let mut left: Vec<usize> = (0..weights.len()).collect();
    if top_k > 0 || top_p < 1.0 {
        left.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
        left.truncate(if top_k > 0 { top_k } else { weights.len() });
        let total: f64 = left.iter().map(|&token| weights[token]).sum();
        let mut sum = 0.0;
        let enough = left.iter().position(|&token| {
            sum += weights[token];
            sum >= top_p * total
        });
        left.truncate(enough.map_or(left.len(), |last| last + 1));
        left.sort_unstable();
    }
    // The likeliest has the weight 1.
    left.retain(|&token| weights[token] >= min_p);
    let mut rest = uniform * left.iter().map(|&token| weights[token]).sum::<f64>();
    let passes = |&&token: &&usize| {
        rest -= weights[token];
        rest < 0.0
    };
    left.iter().find(passes).copied().unwrap_or(largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(logits: &[f32], sampling: Sampling, uniform: f64) -> usize {
        choose(logits, &[], &sampling, uniform)
    }

    /// Weights 1, 1, 2: quarters.
    fn quarters() -> [f32; 3] {
        [0.0, 1.0f32.ln(), 2.0f32.ln()]
    }

    #[test]
    fn choices_follow_the_probabilities() {
        let all = Sampling::default();
        for (uniform, token) in [(0.0, 0), (0.24, 0), (0.26, 1), (0.49, 1), (0.51, 2), (0.999, 2)] {
            assert_eq!(chosen(&quarters(), all, uniform), token);
        }
        assert_eq!(chosen(&quarters(), Sampling { temperature: 0.0, ..all }, 0.0), 2);
        // At a low temperature the likeliest takes nearly all: 2^10 to 1 each.
        assert_eq!(chosen(&quarters(), Sampling { temperature: 0.1, ..all }, 0.01), 2);
        assert_eq!(chosen(&[1.0, 3.0, 3.0], Sampling { temperature: 0.0, ..all }, 0.9), 1, "the first of equal ones");
    }

    /// Over many draws, the shares that tokens have.
    fn shares(logits: &[f32], sampling: Sampling) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        (0..1000).for_each(|draw| counts[chosen(logits, sampling, (f64::from(draw) + 0.5) / 1000.0)] += 1);
        counts
    }

    #[test]
    fn limits_leave_the_likeliest_in_their_proportions() {
        // Weights 1, 2, 3, 4.
        let logits = [1.0f32.ln(), 2.0f32.ln(), 3.0f32.ln(), 4.0f32.ln()];
        let all = Sampling::default();
        let about = |sampling: Sampling, tenths: [usize; 4], of: usize| {
            for (found, share) in shares(&logits, sampling).iter().zip(tenths) {
                assert!(found.abs_diff(1000 * share / of) <= 1, "{sampling:?}: {:?}", shares(&logits, sampling));
            }
        };
        about(all, [1, 2, 3, 4], 10);
        about(Sampling { top_k: 2, ..all }, [0, 0, 3, 4], 7);
        about(Sampling { top_k: 9, ..all }, [1, 2, 3, 4], 10);
        // 0.4 is below 0.5, and 0.7 is enough.
        about(Sampling { top_p: 0.5, ..all }, [0, 0, 3, 4], 7);
        about(Sampling { top_p: 0.05, ..all }, [0, 0, 0, 4], 4);
        // Of the two that are left, 4/7 is enough for a half.
        about(Sampling { top_k: 2, top_p: 0.5, ..all }, [0, 0, 0, 4], 4);
        about(Sampling { min_p: 0.49, ..all }, [0, 2, 3, 4], 9);
        about(Sampling { min_p: 1.0, ..all }, [0, 0, 0, 4], 4);
    }

    #[test]
    fn what_the_text_has_becomes_less_likely_whatever_the_sign() {
        let greedy = Sampling { temperature: 0.0, repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(choose(&[3.0, 2.0], &[0, 0, 7], &greedy, 0.0), 1);
        assert_eq!(choose(&[-1.0, -1.5], &[0], &greedy, 0.0), 1);
        assert_eq!(choose(&[5.0, 2.0], &[0], &greedy, 0.0), 0);
    }
}
