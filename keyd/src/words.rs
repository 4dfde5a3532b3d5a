//! Words for the variants of an enum, which stay when its sentences change: for metrics and alerts.

/// Gives each variant its word, in an `impl` of the enum: `id` says it, and `IDS` has them all.
macro_rules! words {
    ($($variant:pat => $word:literal,)+) => {
        /// Every word that [`id`](Self::id) gives.
        pub const IDS: &[&str] = &[$($word),+];

        /// The word for this variant in metrics and alerts; it stays when the sentence changes.
        pub fn id(&self) -> &'static str {
            match self {
                $($variant => $word,)+
            }
        }
    };
}

pub(crate) use words;
