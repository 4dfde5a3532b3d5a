//! One netlink connection, used synchronously.

use std::io;
use std::os::fd::OwnedFd;

use futures_util::{Stream, StreamExt as _};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::Handle;
use rtnetlink::sys::AsyncSocket as _;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
use tokio::runtime::{Builder, Runtime};

use crate::Error;

/// How often a listing is repeated when the tables change under it.
const ATTEMPTS: u32 = 8;
/// How many questions may be open: their answers, of 1 KiB each with the kernel's own part, have to fit into a socket's buffer of 208 KiB
/// (`net.core.rmem_default`), or else some are lost.
const AT_ONCE: usize = 64;

/// Requests and answers, one at a time, in the network namespace in which it was opened.
pub(super) struct Connection {
    runtime: Runtime,
    handle: Handle,
    /// The netlink port by which the kernel knows us.
    port: u32,
    /// A socket of no protocol that anybody speaks, for the ioctls that translate between device names and indices.
    names: OwnedFd,
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
        let port = connection.socket_mut().socket_mut().bind_auto().map_err(Error::Open)?;
        // It lives as long as the runtime, and moves only while `block_on` runs.
        drop(runtime.spawn(connection));
        drop(guard);
        let names = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
        Ok(Self {
            runtime,
            handle,
            port: port.port_number(),
            names: names.map_err(|error| Error::Open(error.into()))?,
            has_ended: false,
        })
    }

    /// Opens another where this one has ended, so that an error of the socket costs one request and not all that follow.
    fn renew(&mut self) -> Result<(), Error> {
        if self.has_ended {
            *self = Self::open()?;
        }
        Ok(())
    }

    /// Takes note of whether an answer is the connection's end.
    fn note_end<T>(&mut self, answer: &Result<T, Error>) {
        self.has_ended |= matches!(answer, Err(Error::Closed { .. }));
    }

    /// The netlink port by which the kernel knows us.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// Asks for something and expects it to be done. `flags` beside `NLM_F_REQUEST`.
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

    /// The index of a device.
    pub(super) fn index(&self, device: &str) -> Option<u32> {
        netdevice::name_to_index(&self.names, device).ok()
    }

    /// The name of a device.
    pub(super) fn name(&self, index: u32) -> Option<String> {
        netdevice::index_to_name(&self.names, index).ok()
    }

    fn request(
        &mut self,
        operation: &str,
        request: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(Vec<RouteNetlinkMessage>, Listing), Error> {
        self.renew()?;
        let Self { runtime, handle, .. } = self;
        let answer = runtime.block_on(async {
            let stream = send(handle, operation, request, flags)?;
            answers(operation, stream, flags).await
        });
        self.note_end(&answer);
        answer
    }

    /// Asks about several objects. The kernel answers while we still ask, so nobody waits for each answer by itself.
    pub(super) fn ask_all(
        &mut self,
        questions: Vec<(String, RouteNetlinkMessage)>,
    ) -> Result<Vec<Result<Vec<RouteNetlinkMessage>, Error>>, Error> {
        self.renew()?;
        let Self { runtime, handle, .. } = self;
        let mut results = Vec::with_capacity(questions.len());
        runtime.block_on(async {
            let mut questions = questions.into_iter().peekable();
            while questions.peek().is_some() {
                let some = questions.by_ref().take(AT_ONCE);
                let asked: Vec<_> = some
                    .map(|(operation, request)| {
                        let stream = send(handle, &operation, request, 0);
                        (operation, stream)
                    })
                    .collect();
                for (operation, stream) in asked {
                    let answered = match stream {
                        Ok(stream) => answers(&operation, stream, 0).await,
                        Err(error) => Err(error),
                    };
                    results.push(answered.map(|(answers, _)| answers));
                }
            }
        });
        for result in &results {
            self.note_end(result);
        }
        Ok(results)
    }
}

/// Sends a request; the answers come by the stream. `flags` beside `NLM_F_REQUEST`.
fn send(
    handle: &mut Handle,
    operation: &str,
    request: RouteNetlinkMessage,
    flags: u16,
) -> Result<impl Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + use<>, Error> {
    let mut message = NetlinkMessage::from(request);
    message.header.flags = NLM_F_REQUEST | flags;
    handle.request(message).map_err(|_| closed(operation))
}

/// All that is answered to one request.
async fn answers(
    operation: &str,
    mut stream: impl Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + Unpin,
    flags: u16,
) -> Result<(Vec<RouteNetlinkMessage>, Listing), Error> {
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
        Err(closed(operation))
    }
}

fn closed(operation: &str) -> Error {
    Error::Closed {
        operation: operation.to_owned(),
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
