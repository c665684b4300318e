//! Ids beyond the vocabulary panic when the kernel meets them.

use pillion_kernels::Cpu;

use crate::common::Stage;

#[test]
#[should_panic(expected = "token 3 in a vocabulary of 3")]
fn embedding_refuses_a_token_beyond_the_vocabulary() {
    let stage = Stage::new(Cpu);
    let (mut out, table, tokens) = (stage.output(2), stage.output(6), stage.buffer(&[3u32]));
    stage.kernels().embedding(out.view_mut(), table.view(), tokens.view());
}

#[test]
#[should_panic(expected = "target 3 in a vocabulary of 3")]
fn cross_entropy_refuses_a_target_beyond_the_vocabulary() {
    let stage = Stage::new(Cpu);
    let (mut logits, targets, mut loss) = (stage.output(3), stage.buffer(&[3u32]), stage.buffer(&[0.0f64]));
    stage.kernels().cross_entropy(logits.view_mut(), None, targets.view(), loss.view_mut(), 0.0);
}
