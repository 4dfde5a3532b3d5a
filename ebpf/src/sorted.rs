//! Sorted maps side by side: with thousands of entries that hardly differ, one walk over both instead of a look-up for each.

use std::cmp::Ordering;
use std::collections::BTreeMap;

/// Every key of the two, with what each has under it.
pub(crate) fn side_by_side<'a, K: Ord, V>(
    left: &'a BTreeMap<K, V>,
    right: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, Option<&'a V>, Option<&'a V>)> {
    let (mut left, mut right) = (left.iter().peekable(), right.iter().peekable());
    std::iter::from_fn(move || {
        let order = match (left.peek(), right.peek()) {
            (None, None) => return None,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((one, _)), Some((other, _))) => one.cmp(other),
        };
        let of_left = if order.is_le() { left.next() } else { None };
        let of_right = if order.is_ge() { right.next() } else { None };
        let (key, _) = of_left.or(of_right)?;
        Some((key, of_left.map(|(_, value)| value), of_right.map(|(_, value)| value)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_comes_once_with_what_both_have() {
        let left = BTreeMap::from([(1, 'a'), (2, 'b'), (4, 'd')]);
        let right = BTreeMap::from([(2, 'x'), (3, 'c')]);

        let pairs: Vec<_> = side_by_side(&left, &right).collect();

        assert_eq!(
            pairs,
            [
                (&1, Some(&'a'), None),
                (&2, Some(&'b'), Some(&'x')),
                (&3, None, Some(&'c')),
                (&4, Some(&'d'), None)
            ]
        );
    }
}
