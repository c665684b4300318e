//! Rotary position embedding, in place.

use super::value::Value;

/// `x: [B, T, heads, D]`, `cos, sin: [T, D/2]`, shape: (heads, D/2); `sign` is 1 to rotate and −1 to rotate back.
#[inline(always)]
pub(super) fn rotate<T: Value>(x: &mut [T], cos: &[f32], sin: &[f32], shape: (usize, usize), sign: f32) {
    let (heads, half) = shape;
    let tokens = x.chunks_exact_mut(heads * 2 * half);
    for (token, (cos, sin)) in tokens.zip(cos.chunks_exact(half).zip(sin.chunks_exact(half)).cycle()) {
        for head in token.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            for (((a, b), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                let (x, y, sin) = (a.widen(), b.widen(), sign * sin);
                (*a, *b) = (T::narrow(x * cos - y * sin), T::narrow(y * cos + x * sin));
            }
        }
    }
}
