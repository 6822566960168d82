// Command device-plugin tells the kubelet that its node has GPUs.
//
// No GPU is there. But the plugin speaks the kubelet's device-plugin API, and
// gives every container the ids of its devices in NVIDIA_VISIBLE_DEVICES, as
// NVIDIA's plugin does. So the scheduling of GPUs, their quotas and their
// assignment to pods are real. The test cluster starts the plugin after the
// kubelet.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const callTimeout = 5 * time.Second

type plugin struct {
	api.UnimplementedDevicePluginServer
	devices []*api.Device
	refuse  string
}

func (p *plugin) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{}, nil
}

// ListAndWatch sends the list of devices once, because their health never changes.
func (p *plugin) ListAndWatch(_ *api.Empty, stream grpc.ServerStreamingServer[api.ListAndWatchResponse]) error {
	if err := stream.Send(&api.ListAndWatchResponse{Devices: p.devices}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// Allocate fails while the file p.refuse exists, as on a node whose GPUs have
// fallen off the bus. The kubelet then refuses the pod.
func (p *plugin) Allocate(_ context.Context, request *api.AllocateRequest) (*api.AllocateResponse, error) {
	if _, err := os.Stat(p.refuse); err == nil {
		return nil, fmt.Errorf("%s exists: no device can be allocated", p.refuse)
	}
	response := &api.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		ids := strings.Join(container.DevicesIds, ",")
		response.ContainerResponses = append(response.ContainerResponses, &api.ContainerAllocateResponse{
			Envs: map[string]string{"NVIDIA_VISIBLE_DEVICES": ids},
		})
	}
	return response, nil
}

// serveUntilGone registers the plugin and serves on its socket until the
// kubelet removes the socket. The kubelet does so whenever it starts, and then
// the plugin must register again.
func serveUntilGone(p *plugin, folder, resource string) error {
	name := strings.ReplaceAll(resource, "/", "_") + ".sock"
	socket := filepath.Join(folder, name)
	if err := os.Remove(socket); err != nil && !os.IsNotExist(err) {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	api.RegisterDevicePluginServer(server, p)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	defer server.Stop()
	if err := register(folder, name, resource); err != nil {
		return err
	}
	log.Printf("%d devices of %s registered", len(p.devices), resource)
	for {
		select {
		case err := <-served:
			return err
		case <-time.After(time.Second):
			if _, err := os.Stat(socket); err != nil {
				return fmt.Errorf("the kubelet has removed the socket: %w", err)
			}
		}
	}
}

func register(folder, socket, resource string) error {
	kubelet := "unix://" + filepath.Join(folder, "kubelet.sock")
	connection, err := grpc.NewClient(kubelet, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	_, err = api.NewRegistrationClient(connection).Register(ctx, &api.RegisterRequest{
		Version: api.Version, Endpoint: socket, ResourceName: resource,
	})
	return err
}

func main() {
	resource := flag.String("resource", "nvidia.com/gpu", "resource that the devices are advertised as")
	count := flag.Int("count", 8, "number of devices")
	folder := flag.String("folder", "/var/lib/kubelet/device-plugins", "where the kubelet's socket lies")
	refuse := flag.String("refuse", "/run/refuse-devices", "no device is allocated while this file exists")
	flag.Parse()
	p := &plugin{refuse: *refuse}
	for i := range *count {
		p.devices = append(p.devices, &api.Device{ID: fmt.Sprintf("gpu-%d", i), Health: api.Healthy})
	}
	for {
		log.Printf("registering again: %v", serveUntilGone(p, *folder, *resource))
		time.Sleep(500 * time.Millisecond)
	}
}
