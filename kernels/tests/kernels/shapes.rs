//! Wrong shapes and types panic with a reason; what the shapes show, at the call, even where the
//! kernel runs later.

use std::rc::Rc;

use pillion_kernels::{AdamW, AttentionShape, DType, Documents};

use crate::common::Stage;
use crate::devices;

fn lazy() -> Rc<Stage> {
    devices::deferred(1)
}

#[test]
#[should_panic(expected = "linear w")]
fn linear_refuses_a_weight_of_another_shape() {
    let stage = lazy();
    let (mut y, x, w) = (stage.output(6), stage.output(10), stage.output(14));
    stage.kernels().linear(y.view_mut(), x.view(), w.view(), None, 2);
}

#[test]
#[should_panic(expected = "linear x: 10 elements in 3 rows")]
fn linear_refuses_ragged_rows() {
    let stage = lazy();
    let (mut y, x, w) = (stage.output(6), stage.output(10), stage.output(14));
    stage.kernels().linear(y.view_mut(), x.view(), w.view(), None, 3);
}

#[test]
#[should_panic(expected = "should be one type")]
fn linear_adds_to_no_narrow_output() {
    let stage = devices::reference();
    let (mut y, x, w, addend) = (stage.output_as(DType::Bf16, 6), stage.output(10), stage.output(15), stage.output(6));
    stage.kernels().linear(y.view_mut(), x.view(), w.view(), Some(addend.view()), 2);
}

#[test]
#[should_panic(expected = "gradients accumulate in f32")]
fn linear_backward_input_accumulates_in_no_narrow_gradient() {
    let stage = devices::reference();
    let (mut grad_x, grad_y, w) = (stage.output_as(DType::Bf16, 10), stage.output(6), stage.output(15));
    stage.kernels().linear_backward_input(grad_x.view_mut(), grad_y.view(), w.view(), 2, true);
}

#[test]
#[should_panic(expected = "should be one type")]
fn attention_refuses_activations_of_two_types() {
    let stage = lazy();
    let (mut out, mut log_sum) = (stage.output(2), stage.output(1));
    let (q, k, v) = (stage.output_as(DType::Bf16, 2), stage.output(2), stage.output(2));
    let shape = AttentionShape { batch: 1, seq: 1, heads: 1, kv_heads: 1, head_dim: 2 };
    stage.kernels().attention(out.view_mut(), log_sum.view_mut(), q.view(), k.view(), v.view(), shape, None);
}

#[test]
#[should_panic(expected = "rms_norm")]
fn rms_norm_refuses_a_missing_row() {
    let stage = lazy();
    let (mut out, mut inverse_rms, x, weight) = (stage.output(6), stage.output(1), stage.output(6), stage.output(3));
    stage.kernels().rms_norm(out.view_mut(), inverse_rms.view_mut(), x.view(), weight.view(), 1e-5);
}

#[test]
#[should_panic(expected = "2 key/value heads do not divide 3 heads")]
fn attention_refuses_heads_that_do_not_group() {
    let stage = lazy();
    let (mut out, mut log_sum, q, k, v) =
        (stage.output(6), stage.output(3), stage.output(6), stage.output(4), stage.output(4));
    let shape = AttentionShape { batch: 1, seq: 1, heads: 3, kv_heads: 2, head_dim: 2 };
    stage.kernels().attention(out.view_mut(), log_sum.view_mut(), q.view(), k.view(), v.view(), shape, None);
}

#[test]
#[should_panic(expected = "attention keys [4, 2]")]
fn attention_refuses_values_of_another_shape() {
    let stage = lazy();
    let (mut out, mut log_sum, q, k, v) =
        (stage.output(4), stage.output(2), stage.output(4), stage.output(4), stage.output(2));
    let shape = AttentionShape { batch: 1, seq: 1, heads: 2, kv_heads: 2, head_dim: 2 };
    stage.kernels().attention(out.view_mut(), log_sum.view_mut(), q.view(), k.view(), v.view(), shape, None);
}

#[test]
#[should_panic(expected = "documents of another micro-batch")]
fn attention_refuses_documents_of_sequences_of_another_length() {
    let stage = lazy();
    let (mut out, mut log_sum) = (stage.output(4), stage.output(2));
    let (q, k, v) = (stage.output(4), stage.output(4), stage.output(4));
    let shape = AttentionShape { batch: 1, seq: 2, heads: 1, kv_heads: 1, head_dim: 2 };
    let documents = Documents::new(&[0, 0], 1);
    let (out, log_sum) = (out.view_mut(), log_sum.view_mut());
    stage.kernels().attention(out, log_sum, q.view(), k.view(), v.view(), shape, Some(&documents));
}

#[test]
#[should_panic(expected = "rope: 7 elements")]
fn rope_refuses_part_of_a_head() {
    let stage = lazy();
    let (mut x, cos, sin) = (stage.output(7), stage.output(2), stage.output(2));
    stage.kernels().rope(x.view_mut(), cos.view(), sin.view(), 1, 4, false);
}

#[test]
#[should_panic(expected = "embedding table: 10 elements in rows of 3")]
fn embedding_refuses_a_table_with_part_of_a_row() {
    let stage = lazy();
    let (mut out, table, tokens) = (stage.output(6), stage.output(10), stage.buffer(&[0u32, 1]));
    stage.kernels().embedding(out.view_mut(), table.view(), tokens.view());
}

#[test]
#[should_panic(expected = "embedding table: 10 elements in rows of 3")]
fn embedding_backward_refuses_a_table_with_part_of_a_row() {
    let stage = lazy();
    let (mut grad_table, grad_out, tokens) = (stage.output(10), stage.output(6), stage.buffer(&[0u32, 1]));
    stage.kernels().embedding_backward(grad_table.view_mut(), grad_out.view(), tokens.view());
}

#[test]
#[should_panic(expected = "adamw: lengths [3, 3, 3, 4] should be equal")]
fn adamw_refuses_a_longer_gradient() {
    let stage = lazy();
    let [mut weights, mut master, mut m, mut v] = [3; 4].map(|len| stage.output(len));
    let (grad, scale) = (stage.output(4), stage.output(1));
    let settings = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.9, epsilon: 0.1, weight_decay: 0.0 };
    let [master, m, v] = [&mut master, &mut m, &mut v].map(|x| x.view_mut());
    stage.stream.adamw(Some(weights.view_mut()), master, m, v, grad.view(), scale.view(), settings, 1);
}

#[test]
#[should_panic(expected = "a transfer between 3 × f32 and 2 × f32")]
fn an_upload_fills_its_buffer() {
    let stage = lazy();
    let mut x = stage.output(3);
    stage.stream.upload(x.view_mut(), &[1.0f32, 2.0]);
}

#[test]
#[should_panic(expected = "a transfer between 3 × f32 and 3 × u32")]
fn a_download_names_the_type() {
    let stage = lazy();
    stage.stream.download::<u32>(stage.output(3).view()).unwrap();
}

#[test]
#[should_panic(expected = "no cast from u32 to f32")]
fn ids_are_not_cast() {
    let stage = devices::reference();
    let (mut out, x) = (stage.output(1), stage.buffer(&[1u32]));
    stage.stream.cast(out.view_mut(), x.view());
}

#[test]
#[should_panic(expected = "a copy from f32 to bf16")]
fn a_copy_is_not_a_cast() {
    let stage = lazy();
    let (mut out, x) = (stage.output_as(DType::Bf16, 3), stage.output(3));
    stage.stream.copy(out.view_mut(), x.view());
}

#[test]
#[should_panic(expected = "accumulate: lengths [3, 4] should be equal")]
fn an_accumulation_has_one_length() {
    let stage = lazy();
    let (mut out, x) = (stage.output(3), stage.output(4));
    stage.stream.accumulate(out.view_mut(), x.view());
}
