//! The places at which connections are served: bounded in number, and in the time that each may take.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::debug;

/// So many connections are served at once; more wait in the kernel's queue.
pub(crate) struct Places(Arc<Semaphore>);

/// A place that was free.
pub(crate) struct Place(OwnedSemaphorePermit);

impl Places {
    pub(crate) fn new(count: usize) -> Self {
        Self(Arc::new(Semaphore::new(count)))
    }

    /// Waits for a free place.
    pub(crate) async fn free(&self) -> Place {
        let permit = Arc::clone(&self.0).acquire_owned().await;
        Place(permit.expect("the semaphore is never closed"))
    }
}

impl Place {
    /// Answers a request of this kind in a task of its own, for as long as `patience` lasts. Since both number and time are bounded, nobody
    /// needs to join it.
    pub(crate) fn serve<E: Display>(
        self,
        kind: &'static str,
        patience: Duration,
        answer: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let Self(place) = self;
        tokio::spawn(async move {
            match tokio::time::timeout(patience, answer).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!(%error, "{kind} request broke off"),
                Err(_) => debug!("{kind} request took too long"),
            }
            drop(place);
        });
    }
}
