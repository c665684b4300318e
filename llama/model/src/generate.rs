//! Text out: token by token, each from a forward pass over what came before.

use std::ops::ControlFlow;

use pillion_kernels::random;
use pillion_runtime::Engine;

use crate::model::Model;

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

/// Goes on from `prompt` for `count` tokens; `model` is one of `seq` tokens, and of any batch: the
/// first sequence is the text, and the others are not used. It chooses among the first `known`
/// tokens of the vocabulary. Every rank calls it alike and gets the same. `temperature` divides the logits; at 0 the likeliest token is taken.
///
/// # Errors
/// [`Error::NonFinite`] when the model's logits are not finite; when another rank has failed.
///
/// # Panics
/// With an empty prompt.
pub fn generate(
    engine: &mut Engine,
    model: &mut Model,
    seq: usize,
    known: usize,
    prompt: &[u16],
    count: usize,
    temperature: f64,
    seed: u64,
) -> Result<Vec<u16>, Error> {
    let mut text = Vec::new();
    generate_each(engine, model, seq, known, prompt, count, temperature, seed, |token| {
        text.push(token);
        Ok::<_, Error>(ControlFlow::Continue(()))
    })?;
    Ok(text)
}

/// As [`generate`], but hands each token to `each` as soon as it is chosen, until that breaks.
///
/// # Errors
/// As for [`generate`], and those of `each`.
///
/// # Panics
/// With an empty prompt.
pub fn generate_each<E: From<Error>>(
    engine: &mut Engine,
    model: &mut Model,
    seq: usize,
    known: usize,
    prompt: &[u16],
    count: usize,
    temperature: f64,
    seed: u64,
    mut each: impl FnMut(u16) -> Result<ControlFlow<()>, E>,
) -> Result<(), E> {
    assert!(!prompt.is_empty(), "text goes on from a prompt of at least one token");
    // No token sees more than `seq` before it.
    let mut context = prompt[prompt.len().saturating_sub(seq)..].to_vec();
    for index in 0..count {
        let last = context.len() - 1;
        // What follows the context cannot influence it: attention is causal.
        let mut inputs = vec![0; model.tokens()];
        inputs.iter_mut().zip(&context).for_each(|(input, &token)| *input = u32::from(token));
        let mut step = engine.begin_evaluation(1).map_err(Error::from)?;
        let logits = model.logits(&mut step, &inputs).map_err(Error::from)?;
        step.end().map_err(Error::from)?;
        let vocab = logits.len() / inputs.len();
        let logits = &logits[last * vocab..][..vocab.min(known)];
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err(Error::NonFinite.into());
        }
        let chosen = choose(logits, temperature, random::uniform(seed, 0, index as u64)) as u16;
        if context.len() == seq {
            context.remove(0);
        }
        context.push(chosen);
        if each(chosen)?.is_break() {
            break;
        }
    }
    Ok(())
}

/// The token at which the cumulated probabilities pass `uniform`.
fn choose(logits: &[f32], temperature: f64, uniform: f64) -> usize {
    let largest = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("a vocabulary has tokens");
    if temperature == 0.0 {
        return largest;
    }
    let weight = |&x: &f32| ((f64::from(x) - f64::from(logits[largest])) / temperature).exp();
    let mut rest = uniform * logits.iter().map(weight).sum::<f64>();
    let passes = |x: &f32| {
        rest -= weight(x);
        rest < 0.0
    };
    logits.iter().position(passes).unwrap_or(largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_follow_the_probabilities() {
        let logits = [0.0, 1.0f32.ln(), 2.0f32.ln()];
        // Weights 1, 1, 2: quarters.
        for (uniform, token) in [(0.0, 0), (0.24, 0), (0.26, 1), (0.49, 1), (0.51, 2), (0.999, 2)] {
            assert_eq!(choose(&logits, 1.0, uniform), token);
        }
        assert_eq!(choose(&logits, 0.0, 0.0), 2);
        // At a low temperature the likeliest takes nearly all: 2^10 to 1 each.
        assert_eq!(choose(&logits, 0.1, 0.01), 2);
    }
}
