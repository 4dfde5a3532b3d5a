//! One netlink connection, used synchronously.

use std::io;

use futures_util::StreamExt as _;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::Handle;
use tokio::runtime::{Builder, Runtime};

use crate::Error;

/// How often a listing is repeated when the tables change under it.
const ATTEMPTS: u32 = 8;

/// Requests and answers, one at a time, in the network namespace in which it was opened.
pub(super) struct Connection {
    runtime: Runtime,
    handle: Handle,
    /// Whether it has ended: netlink-proto gives up at the first error of its socket, for good.
    has_ended: bool,
}

impl Connection {
    pub(super) fn open() -> Result<Self, Error> {
        let runtime = Builder::new_current_thread().enable_io().build().map_err(Error::Open)?;
        let guard = runtime.enter();
        let (mut connection, handle, _) = rtnetlink::new_connection_with_strict_check().map_err(Error::Open)?;
        // Otherwise netlink-proto keeps them to itself, and the end of a request looks like the end of the connection
        // (`Connection::forward_responses`).
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        // It lives as long as the runtime, and moves only while `block_on` runs.
        drop(runtime.spawn(connection));
        drop(guard);
        Ok(Self {
            runtime,
            handle,
            has_ended: false,
        })
    }

    /// Asks for something and expects it to be done. `flags` beside `NLM_F_REQUEST` and `NLM_F_ACK`.
    pub(super) fn change(&mut self, operation: &str, request: RouteNetlinkMessage, flags: u16) -> Result<(), Error> {
        self.request(operation, request, flags | NLM_F_ACK).map(drop)
    }

    /// Asks about one object.
    pub(super) fn ask(
        &mut self,
        operation: &str,
        request: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        Ok(self.request(operation, request, 0)?.0)
    }

    /// Asks for all objects, again if they changed in between: an interrupted listing may lack some and hold others twice.
    pub(super) fn list(
        &mut self,
        operation: &str,
        request: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        for _ in 0..ATTEMPTS {
            match self.request(operation, request.clone(), NLM_F_DUMP)? {
                (answers, Listing::Whole) => return Ok(answers),
                (_, Listing::Interrupted) => {}
            }
        }
        Err(Error::Restless {
            operation: operation.to_owned(),
            attempts: ATTEMPTS,
        })
    }

    fn request(
        &mut self,
        operation: &str,
        request: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(Vec<RouteNetlinkMessage>, Listing), Error> {
        if self.has_ended {
            // An error of the socket costs one request, and not all that follow.
            *self = Self::open()?;
        }
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | flags;
        let closed = || Error::Closed {
            operation: operation.to_owned(),
        };
        let Self { runtime, handle, .. } = self;
        let answer = runtime.block_on(async {
            let mut stream = handle.request(message).map_err(|_| closed())?;
            let mut answers = Vec::new();
            let mut listing = Listing::Whole;
            // An acknowledgement or a "done" is the last word, or the answer itself where neither was asked for. Without it the connection
            // ended: what we asked for may have happened or not, and a listing lacks its rest.
            let acknowledged = flags & (NLM_F_ACK | NLM_F_DUMP) != 0;
            let mut complete = false;
            while let Some(message) = stream.next().await {
                if message.header.flags & NLM_F_DUMP_INTR != 0 {
                    listing = Listing::Interrupted;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => {
                        answers.push(answer);
                        complete |= !acknowledged;
                    }
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(Error::request(operation, error.to_io()));
                    }
                    NetlinkPayload::Done(done) if done.code != 0 => {
                        return Err(Error::request(operation, io::Error::from_raw_os_error(done.code.abs())));
                    }
                    NetlinkPayload::Overrun(_) => {
                        listing = Listing::Interrupted;
                        complete = true;
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => complete = true,
                    _ => {}
                }
            }
            if complete {
                Ok((answers, listing))
            } else {
                Err(closed())
            }
        });
        self.has_ended = matches!(answer, Err(Error::Closed { .. }));
        answer
    }
}

/// Whether a listing can be believed.
enum Listing {
    Whole,
    Interrupted,
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::LinkMessage;

    use super::*;

    #[test]
    fn a_connection_that_ends_in_the_middle_of_a_request_is_an_error_whatever_was_asked() {
        let request = || RouteNetlinkMessage::GetLink(LinkMessage::default());

        let changed = ending().change("change", request(), 0);
        let asked = ending().ask("ask", request());
        let listed = ending().list("list", &request());

        for error in [changed.err(), asked.err(), listed.err()] {
            assert!(matches!(error, Some(Error::Closed { .. })), "{error:?}");
        }
    }

    #[test]
    fn after_the_end_of_a_connection_the_next_request_has_another() {
        let mut connection = ending();
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());

        let first = connection.list("list", &request);
        let second = connection.list("list", &request);

        assert!(matches!(first, Err(Error::Closed { .. })), "{first:?}");
        assert!(!second.unwrap().is_empty());
    }

    #[test]
    fn a_connection_that_lives_lists_the_loopback_device() {
        let mut connection = Connection::open().unwrap();

        let links = connection.list("list", &RouteNetlinkMessage::GetLink(LinkMessage::default()));

        assert!(!links.unwrap().is_empty());
    }

    /// A connection that takes one request and then ends.
    fn ending() -> Connection {
        let connection = Connection::open().unwrap();
        let (driver, handle, _) = {
            let _guard = connection.runtime.enter();
            rtnetlink::new_connection_with_strict_check().unwrap()
        };
        // `block_on` looks after the request first, and after this when the request waits.
        drop(connection.runtime.spawn(async move { drop(driver) }));
        Connection { handle, ..connection }
    }
}
