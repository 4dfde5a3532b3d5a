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
}

impl Connection {
    pub(super) fn open() -> Result<Self, Error> {
        let runtime = Builder::new_current_thread().enable_io().build().map_err(Error::Open)?;
        let guard = runtime.enter();
        let (connection, handle, _) = rtnetlink::new_connection_with_strict_check().map_err(Error::Open)?;
        // It lives as long as the runtime, and moves only while `block_on` runs.
        drop(runtime.spawn(connection));
        drop(guard);
        Ok(Self { runtime, handle })
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
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | flags;
        let closed = || Error::Closed {
            operation: operation.to_owned(),
        };
        let Self { runtime, handle } = self;
        runtime.block_on(async {
            let mut stream = handle.request(message).map_err(|_| closed())?;
            let mut answers = Vec::new();
            let mut listing = Listing::Whole;
            // A connection that ended ends the stream, and so do an acknowledgement and a "done", which the crate keeps to itself.
            let mut ended = true;
            while let Some(message) = stream.next().await {
                ended = false;
                if message.header.flags & NLM_F_DUMP_INTR != 0 {
                    listing = Listing::Interrupted;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(Error::request(operation, error.to_io()));
                    }
                    NetlinkPayload::Overrun(_) => listing = Listing::Interrupted,
                    NetlinkPayload::Done(done) if done.code != 0 => {
                        return Err(Error::request(operation, io::Error::from_raw_os_error(done.code.abs())));
                    }
                    _ => {}
                }
            }
            let acknowledged = flags & (NLM_F_ACK | NLM_F_DUMP) != 0;
            if ended && !acknowledged {
                Err(closed())
            } else {
                Ok((answers, listing))
            }
        })
    }
}

/// Whether a listing can be believed.
enum Listing {
    Whole,
    Interrupted,
}
